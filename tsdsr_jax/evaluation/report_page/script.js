"use strict";
// Runs before the pictures after it have loaded: the grid works at once, and opening a picture waits for it.

const { entries, columns } = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const cards = [...$("grid").children];
const clamp = (value, low, high) => Math.min(Math.max(value, low), high);

function make(tag, text, className = "") {
  const element = document.createElement(tag);
  element.textContent = text;
  element.className = className;
  return element;
}

// ---- grid: sorting and filtering ----

const byName = new Intl.Collator(undefined, { numeric: true }).compare;
const letters = (text) => text.normalize("NFKD").toLowerCase();
// Indices of the entries shown, in order.
let order = [];
let descending = false;

const sortColumn = () => ($("sort").value === "name" ? -1 : Number($("sort").value));

function compare(a, b) {
  const column = sortColumn();
  const turn = descending ? -1 : 1;
  const names = byName(entries[a].name, entries[b].name);
  if (column < 0) return turn * names;
  const [first, second] = [entries[a].values[column], entries[b].values[column]];
  // Entries without a value come last in both directions.
  if (first === null || second === null) return (first === null) - (second === null) || names;
  return turn * (first - second) || names;
}

function arrange() {
  const words = letters($("filter").value).split(/\s+/);
  const matches = (entry) => words.every((word) => letters(entry.name).includes(word));
  const sorted = entries.map((_, index) => index).sort(compare);
  order = sorted.filter((index) => matches(entries[index]));
  const shown = new Set(order);
  for (const index of sorted) cards[index].hidden = !shown.has(index);
  $("grid").append(...sorted.map((index) => cards[index]));
  const all = entries.length;
  $("count").value = order.length < all ? `${order.length} of ${all}` : `${all} image${all === 1 ? "" : "s"}`;
  $("empty").hidden = order.length > 0 || all === 0;
  $("direction").textContent = directionName();
}

function directionName() {
  const column = sortColumn();
  if (column < 0) return descending ? "Z to A" : "A to Z";
  const better = columns[column].better;
  if (better === null) return descending ? "high to low" : "low to high";
  return (better === "higher") === descending ? "best first" : "worst first";
}

$("sort").addEventListener("change", () => {
  const column = sortColumn();
  // Worst first, because those are the ones to look at.
  descending = column >= 0 && columns[column].better === "lower";
  arrange();
});
$("direction").addEventListener("click", () => {
  descending = !descending;
  arrange();
});
$("filter").addEventListener("input", arrange);
$("toolbar").addEventListener("submit", (event) => event.preventDefault());
$("grid").addEventListener("click", (event) => {
  const card = event.target.closest("button")?.closest(".card");
  if (card) visit(cards.indexOf(card));
});

// ---- viewer: which image, which layers ----

const viewer = $("viewer");
const stage = $("stage");
const divider = $("divider");
const panes = [...stage.querySelectorAll(".pane")];
const selects = [$("left"), $("right")];

// `sides`: the layers on the left and right; `wanted`: their titles once the user has chosen, kept for other images. `at`: the
// divider's position across the visible part of the picture, from 0 to 1. `scale`: CSS pixels per pixel of the largest layer,
// null to fit; `x`, `y`: the picture's corner on the stage.
const view = { index: -1, sides: [0, 0], wanted: null, at: 0.5, scale: null, x: 0, y: 0 };
// Counts requests for pictures, so that one that loads late does not replace a newer one.
let reading = 0;

const nameInAddress = () => {
  try {
    return decodeURIComponent(location.hash.slice(1));
  } catch {
    return location.hash.slice(1);
  }
};

// The address follows the viewer, so that a link opens an image and a phone's Back button closes it.
function visit(index) {
  const address = "#" + encodeURIComponent(entries[index].name);
  if (viewer.open) history.replaceState(history.state, "", address);
  else history.pushState({ opened: true }, "", address);
  show(index);
}

function followAddress() {
  const name = nameInAddress();
  if (viewer.open && entries[view.index].name === name) return;
  const index = entries.findIndex((entry) => entry.name === name);
  if (index >= 0) show(index);
  else viewer.close();
}

function closed() {
  reading += 1;
  for (const pane of panes) pane.replaceChildren();
  if (location.hash) {
    if (history.state?.opened) history.back();
    else history.replaceState(null, "", location.href.split("#")[0]);
  }
  cards[view.index].querySelector("button").focus();
}

function show(index) {
  const { name, layers, facts } = entries[index];
  const titles = layers.map((layer) => layer.title);
  const kept = (view.wanted ?? []).map((title) => titles.indexOf(title));
  const usual = [0, Math.min(1, layers.length - 1)];
  Object.assign(view, { index, scale: null, sides: usual.map((side, i) => (kept[i] >= 0 ? kept[i] : side)) });
  $("name").textContent = name;
  for (const select of selects) select.replaceChildren(...titles.map((title, i) => new Option(title, i)));
  $("facts").replaceChildren(...facts.map(fact));
  $("values").replaceChildren(...[...cards[index].querySelectorAll(".values")].map((table) => table.cloneNode(true)));
  viewer.querySelector(".sides").hidden = divider.hidden = layers.length < 2;
  if (!viewer.open) viewer.showModal();
  showPlace();
  showSides();
}

function fact([key, value]) {
  const pair = make("div", "");
  pair.append(make("dt", key), make("dd", value));
  return pair;
}

function showPlace() {
  const place = order.indexOf(view.index);
  $("place").textContent = place < 0 ? "" : `${place + 1} of ${order.length}`;
  $("previous").disabled = place <= 0;
  $("next").disabled = place < 0 || place === order.length - 1;
}

function step(by) {
  const place = order.indexOf(view.index);
  const next = order[place + by];
  if (place >= 0 && next !== undefined) visit(next);
}

// Pictures and their captions change together.
async function showSides() {
  const mine = ++reading;
  view.sides.forEach((side, i) => (selects[i].value = side));
  const late = setTimeout(() => {
    if (mine === reading) $("waiting").hidden = false;
  }, 200);
  const contents = await Promise.all(view.sides.map((side) => content(view.index, side)));
  clearTimeout(late);
  if (mine !== reading) return;
  $("waiting").hidden = true;
  panes.forEach((pane, i) => pane.replaceChildren(contents[i]));
  describeSides();
  layout();
}

function describeSides() {
  const { layers } = entries[view.index];
  const chosen = view.sides.map((side) => layers[side]);
  [$("left-tag"), $("right-tag")].forEach((tag, i) => {
    tag.textContent = chosen[i]?.title;
    tag.hidden = layers.length <= i;
  });
  $("captions").replaceChildren(...[...new Set(chosen)].filter(Boolean).flatMap(caption));
}

function caption(layer) {
  const size = layer.size ? ` ${layer.size[0]}×${layer.size[1]}, ${layer.encoding}\n` : " cannot be shown\n";
  return [make("b", layer.title), size];
}

// An <img> of the decoded picture, or a sentence instead.
async function content(index, side) {
  const layer = entries[index].layers[side];
  if (!layer?.size) return make("p", layer?.error ?? "This entry has no picture.");
  const block = await arrived(`picture-${index}-${side}`);
  const image = make("img", "");
  image.alt = `${layer.title}: ${entries[index].name}`;
  image.draggable = false;
  const [width, height] = largest();
  // Pictures whose sizes differ by rounding are stretched to fit; those of another shape are not.
  image.classList.toggle("other-shape", Math.abs(Math.log((layer.size[0] * height) / (layer.size[1] * width))) > 0.03);
  try {
    image.src = `data:${block.dataset.type};base64,${block.textContent}`;
    await image.decode();
    return image;
  } catch {
    return make("p", `${layer.title}: this report is incomplete or damaged; create it again.`);
  }
}

// The block with this id, once the browser has parsed all of it; null if the page ends without it.
async function arrived(id) {
  for (;;) {
    const block = $(id);
    if (block?.nextSibling || document.readyState !== "loading") return block;
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

function choose(sides) {
  view.sides = sides;
  view.wanted = sides.map((side) => entries[view.index].layers[side]?.title);
  showSides();
}

// ---- viewer: geometry ----

const LARGEST_SCALE = 64;

// Width and height of the entry's largest layer, whose pixels the zoom refers to.
function largest() {
  const sizes = entries[view.index].layers.map((layer) => layer.size).filter(Boolean);
  return sizes.sort((a, b) => b[0] * b[1] - a[0] * a[1])[0] ?? [1, 1];
}

const fitting = () => {
  const [width, height] = largest();
  return Math.min(stage.clientWidth / width, stage.clientHeight / height);
};

// The picture's rectangle on the stage.
function rectangle() {
  const scale = view.scale ?? fitting();
  const [width, height] = largest().map((side) => side * scale);
  return { x: view.x, y: view.y, width, height };
}

const isZoomed = () => {
  const { width, height } = rectangle();
  return width > stage.clientWidth + 0.5 || height > stage.clientHeight + 0.5;
};

// The range of the divider: the visible part of the picture.
function reach() {
  const { x, width } = rectangle();
  return [Math.max(0, x), Math.min(stage.clientWidth, x + width)];
}

function layout() {
  if (!viewer.open) return;
  const [wide, high] = [stage.clientWidth, stage.clientHeight];
  const { x, y, width, height } = rectangle();
  const whole = (value) => Math.round(value * devicePixelRatio) / devicePixelRatio;
  // A picture smaller than the stage is centered; a larger one leaves no gap.
  view.x = whole(width <= wide ? (wide - width) / 2 : clamp(x, wide - width, 0));
  view.y = whole(height <= high ? (high - height) / 2 : clamp(y, high - height, 0));
  for (const image of stage.querySelectorAll("img")) {
    const { style } = image;
    [style.left, style.top, style.width, style.height] = [view.x, view.y, width, height].map((v) => `${v}px`);
  }
  stage.classList.toggle("zoomed", isZoomed());
  const [from, to] = reach();
  for (const tag of [$("left-tag"), $("right-tag")]) tag.style.maxWidth = `${Math.max(0, (to - from) / 2 - 24)}px`;
  $("left-tag").style.left = `${from}px`;
  $("right-tag").style.right = `${wide - to}px`;
  for (const id of ["left-tag", "right-tag"]) $(id).style.bottom = `${Math.max(0, high - view.y - height)}px`;
  $("percent").value = `${Math.round((width / largest()[0]) * devicePixelRatio * 100)} %`;
  layoutDivider();
}

function layoutDivider() {
  const [from, to] = reach();
  const line = divider.hidden ? 0 : from + (to - from) * view.at;
  const wide = stage.clientWidth;
  divider.style.left = `${line}px`;
  divider.setAttribute("aria-valuenow", Math.round(view.at * 100));
  divider.setAttribute("aria-valuetext", `${Math.round(view.at * 100)} % ${$("left-tag").textContent}`);
  panes[0].style.clipPath = `inset(0 ${wide - line}px 0 0)`;
  panes[1].style.clipPath = `inset(0 0 0 ${line}px)`;
  // A message instead of a picture stays on its side.
  for (const text of stage.querySelectorAll(".pane p")) {
    const [start, end] = text.parentElement === panes[0] && !divider.hidden ? [from, line] : [line, to];
    text.style.left = `${Math.max(start, from)}px`;
    text.style.right = `${wide - end}px`;
  }
}

function divideAt(pixel) {
  const [from, to] = reach();
  view.at = clamp((pixel - from) / (to - from), 0, 1);
  layoutDivider();
}

function divideBy(part) {
  view.at = clamp(view.at + part, 0, 1);
  layoutDivider();
}

// Zooms around (x, y), which stays in place.
function zoomTo(wanted, x = stage.clientWidth / 2, y = stage.clientHeight / 2) {
  const before = view.scale ?? fitting();
  const scale = clamp(wanted, Math.min(fitting(), 1 / devicePixelRatio), Math.max(fitting(), LARGEST_SCALE));
  view.x = x - ((x - view.x) * scale) / before;
  view.y = y - ((y - view.y) * scale) / before;
  view.scale = scale;
  layout();
}

const zoomBy = (factor, x, y) => zoomTo((view.scale ?? fitting()) * factor, x, y);

function zoomToFit() {
  view.scale = null;
  layout();
}

function pan(x, y) {
  view.x += x;
  view.y += y;
  layout();
}

function toggleSquares() {
  const squares = stage.classList.toggle("squares");
  $("pixels").setAttribute("aria-pressed", squares);
}

// ---- viewer: mouse, fingers, keys ----

// Position on the stage of each pressed pointer, by id.
const pointers = new Map();
// What a pointer does: "divide", "pan" or "swipe"; with two pointers, "pinch".
let gesture = null;
let start = null;
// Distance from the divider's line to the finger that holds it.
let grip = 0;

function onStage(event) {
  const { left, top } = stage.getBoundingClientRect();
  return { x: event.clientX - left, y: event.clientY - top };
}

function middle() {
  const [a, b] = [...pointers.values()];
  return { x: (a.x + b.x) / 2, y: (a.y + b.y) / 2, distance: Math.max(1, Math.hypot(a.x - b.x, a.y - b.y)) };
}

function gestureFor(event) {
  if (event.target.closest(".divider")) return "divide";
  if (isZoomed()) return "pan";
  return event.pointerType === "touch" || divider.hidden ? "swipe" : "divide";
}

stage.addEventListener("pointerdown", (event) => {
  if (event.button !== 0) return;
  event.preventDefault();
  divider.focus();
  stage.setPointerCapture(event.pointerId);
  start = onStage(event);
  pointers.set(event.pointerId, start);
  gesture = pointers.size > 1 ? "pinch" : gestureFor(event);
  stage.classList.toggle("panning", gesture === "pan");
  grip = event.target.closest(".divider") ? start.x - divider.offsetLeft - divider.offsetWidth / 2 : 0;
  if (gesture === "divide") divideAt(start.x - grip);
});

stage.addEventListener("pointermove", (event) => {
  const last = pointers.get(event.pointerId);
  if (!last) return;
  const now = onStage(event);
  if (gesture === "pinch" && pointers.size === 2) {
    const before = middle();
    pointers.set(event.pointerId, now);
    const after = middle();
    zoomBy(after.distance / before.distance, before.x, before.y);
    pan(after.x - before.x, after.y - before.y);
    return;
  }
  pointers.set(event.pointerId, now);
  if (gesture === "divide") divideAt(now.x - grip);
  if (gesture === "pan") pan(now.x - last.x, now.y - last.y);
});

function released(event) {
  if (!pointers.delete(event.pointerId)) return;
  if (gesture === "swipe" && event.type === "pointerup") swiped(onStage(event));
  gesture = gesture === "pinch" && pointers.size === 1 && isZoomed() ? "pan" : null;
  stage.classList.remove("panning");
}

function swiped(end) {
  const [right, down] = [end.x - start.x, end.y - start.y];
  if (Math.abs(right) > 45 && Math.abs(right) > 2 * Math.abs(down)) step(right < 0 ? 1 : -1);
  else if (Math.hypot(right, down) < 10) divideAt(end.x);
}

stage.addEventListener("pointerup", released);
stage.addEventListener("pointercancel", released);
stage.addEventListener("dblclick", (event) => {
  const { x, y } = onStage(event);
  if (isZoomed()) zoomToFit();
  else zoomTo(Math.max(1 / devicePixelRatio, 2 * fitting()), x, y);
});
stage.addEventListener(
  "wheel",
  (event) => {
    event.preventDefault();
    const { x, y } = onStage(event);
    // Converts lines and pages to pixels. A trackpad sends a pinch as small steps with Ctrl.
    const pixels = event.deltaY * [1, 16, 400][event.deltaMode] * (event.ctrlKey ? 5 : 1);
    zoomBy(Math.exp(-clamp(pixels, -300, 300) / 500), x, y);
  },
  { passive: false },
);

const actions = {
  previous: () => step(-1),
  next: () => step(1),
  close: () => viewer.close(),
  swap: () => choose([...view.sides].reverse()),
  in: () => zoomBy(1.5),
  out: () => zoomBy(1 / 1.5),
  fit: zoomToFit,
  actual: () => zoomTo(1 / devicePixelRatio),
  pixels: toggleSquares,
};
const keys = {
  ArrowLeft: (event) => divideBy(event.shiftKey ? -0.1 : -0.02),
  ArrowRight: (event) => divideBy(event.shiftKey ? 0.1 : 0.02),
  Home: () => divideBy(-1),
  End: () => divideBy(1),
  ArrowUp: actions.previous,
  PageUp: actions.previous,
  p: actions.previous,
  ArrowDown: actions.next,
  PageDown: actions.next,
  n: actions.next,
  " ": actions.swap,
  "+": actions.in,
  "=": actions.in,
  "-": actions.out,
  "−": actions.out,
  0: actions.fit,
  1: actions.actual,
  x: actions.pixels,
};

for (const [id, action] of Object.entries(actions)) {
  $(id).addEventListener("click", (event) => {
    action();
    // After a mouse click, keys go to the viewer again; after Tab, the focus stays on the button.
    if (event.detail > 0 && viewer.open) divider.focus();
  });
}

// On the whole document, because disabling the focused button moves the focus out of the viewer.
document.addEventListener("keydown", (event) => {
  if (!viewer.open || event.ctrlKey || event.metaKey || event.altKey) return;
  const onSelect = event.target.matches("select");
  const onButton = event.target.matches("button") && event.key === " ";
  const action = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!action || onSelect || onButton) return;
  event.preventDefault();
  action(event);
});

selects.forEach((select) => {
  let byPointer = false;
  select.addEventListener("pointerdown", () => (byPointer = true));
  select.addEventListener("keydown", () => (byPointer = false));
  select.addEventListener("change", () => {
    choose(selects.map((each) => Number(each.value)));
    if (byPointer) divider.focus();
  });
});

viewer.addEventListener("close", closed);
new ResizeObserver(layout).observe(stage);
addEventListener("popstate", followAddress);

arrange();
if (location.hash) followAddress();
