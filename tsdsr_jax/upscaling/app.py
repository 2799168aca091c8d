"""The web page that upscales one photograph at a time: its layout and its server, with Gradio."""

from __future__ import annotations

import os
from pathlib import Path
from typing import get_args

import gradio as gr

from tsdsr_jax.errors import UserError
from tsdsr_jax.images.color import AlignMethod
from tsdsr_jax.images.writing import FORMATS
from tsdsr_jax.upscaling.options import UpscaleOptions
from tsdsr_jax.upscaling.page_events import Choice, Handlers
from tsdsr_jax.upscaling.upscaler import Upscaler
from tsdsr_jax.weights.bundled import is_bundled

# Seconds between two sweeps of old files, and until a file is old: a photograph may wait for hours for a CPU.
_SWEEP_EVERY, _KEEP = 600, 6 * 3600
_HEAD = """## TSD-SR
Makes a small, blurry, noisy photo large and sharp. Fine detail is invented: do not rely on faces or text."""
_SMALL_HEAD = """## TSD-SR, small model
Enlarges a photo and removes noise. This page runs the small model bundled with tsdsr_jax, a demonstration: it sharpens
edges, but does not invent detail as TSD-SR does with Stable Diffusion 3."""
_QUEUE = "device"
# What Gradio says to screen readers but has no words for.
_WORDS = {"common.complete": "Done"}
# A finger moves the slider sideways and the page up and down. The place for the file is hidden until there is one, and
# so is Gradio's error badge, which would cover the name of the file that has the error.
_CSS = """
#result .slider-wrap { touch-action: pan-y }
#file:has(.empty) { display: none }
#photo [data-testid="status-tracker"], #summary [data-testid="status-tracker"]:has(.error) { display: none }
#summary { min-height: 4em }
#summary [data-testid="status-tracker"] { background: var(--body-background-fill) !important }
#summary [role="alert"] { font-weight: 600 }
"""


def build_page(upscaler: Upscaler, root: Path, max_waiting: int) -> gr.Blocks:
    """Builds the page without serving it.

    Args:
      upscaler: the model. Its options are the page's first settings.
      root: the private folder.
      max_waiting: number of requests that may wait; one is computed at a time.
    """
    handlers = Handlers(upscaler, root)
    page = gr.Blocks(title="TSD-SR", analytics_enabled=False, delete_cache=(_SWEEP_EVERY, _KEEP))
    with page:
        gr.Markdown(_SMALL_HEAD if is_bundled(upscaler.options.pretrained_model_name_or_path) else _HEAD)
        choice = gr.State(Choice())
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                photo, about, settings = _controls(upscaler.options)
                with gr.Row():
                    button = gr.Button("Upscale", variant="primary", elem_id="upscale", min_width=120)
                    cancel = gr.Button("Cancel", elem_id="cancel", min_width=120)
            with gr.Column(scale=3, min_width=340):
                outputs = _results()
        request = [photo, *settings, choice]
        # The progress is shown in the summary's place, so that the photograph stays visible.
        click = button.click(
            handlers.upscale_on_page,
            request,
            outputs,
            scroll_to_output=True,
            show_progress_on=outputs[-1],
            api_visibility="private",
            concurrency_id=_QUEUE,
        )
        cancel.click(
            handlers.cancel,
            [choice],
            outputs[-1:],
            queue=False,
            show_progress="hidden",
            cancels=[click],
            api_visibility="private",
        )
        # For programs, in the same line.
        gr.Button(visible=False).click(
            handlers.upscale, request, outputs, api_name="upscale", concurrency_id=_QUEUE
        )
        _show_choices(handlers, photo, choice, click, [*outputs, about])
    return page.queue(max_size=max_waiting, default_concurrency_limit=1)


def _show_choices(
    handlers: Handlers,
    photo: gr.File,
    choice: gr.State,
    click: gr.events.Dependency,
    outputs: list[gr.components.Component],
) -> None:
    """Shows a new photograph at once and cancels the work on the last one.

    This bypasses the queue, which may be full of photographs to compute.

    Args:
      outputs: slider, file, summary and the photograph's description.
    """
    chosen = photo.change(
        handlers.choose,
        [photo, choice],
        outputs,
        queue=False,
        show_progress="hidden",
        cancels=[click],
        trigger_mode="always_last",
        api_visibility="private",
    )
    chosen.then(
        handlers.show,
        [photo, choice],
        [outputs[0], outputs[-1]],
        queue=False,
        show_progress_on=outputs[0],
        trigger_mode="multiple",
        api_visibility="private",
    )


def _raw(component: gr.components.Component) -> gr.components.Component:
    """Makes a component pass its input on unchanged. Gradio would round it or fail; `Handlers` checks it and names the
    field.

    This is no subclass, because Gradio writes a .pyi file beside the source of each subclass.
    """
    component.preprocess = lambda payload: payload  # type: ignore[method-assign]  # for this component only
    return component


def _controls(options: UpscaleOptions) -> tuple[gr.File, gr.HTML, list[gr.components.Component]]:
    """The photograph, its description, and the settings in the order of `Handlers.upscale`."""
    # A plain file: Gradio's image component would drop the profile, the EXIF and all but 8 bits.
    # Any file name will do: the content is looked at, and a photograph may lack a suffix.
    photo = gr.File(label="Photo", height=140, elem_id="photo")
    about = gr.HTML(elem_id="about")
    with gr.Row():
        scale = _raw(gr.Number(options.upscale, label="Scale", step=0.5, min_width=120, elem_id="scale"))
        format = _raw(
            gr.Dropdown(list(FORMATS), value="png", label="Format", min_width=120, elem_id="format")
        )
    with gr.Accordion("More settings", open=False):
        colors = _raw(
            gr.Dropdown(
                list(get_args(AlignMethod)),
                value=options.align_method,
                label="Colors",
                info="Take the low frequencies (wavelet) or the mean and contrast (adain) from the photo; nofix: neither.",
                elem_id="colors",
            )
        )
        seed = _raw(
            gr.Number(
                options.seed, label="Seed", info="A different seed gives different details.", elem_id="seed"
            )
        )
        tile = _raw(
            gr.Number(
                options.latent_tiled_size,
                step=8,
                label="Tile size",
                info="In units of 8 pixels of the result. Smaller tiles need less memory; larger ones see more at once.",
                elem_id="tile",
            )
        )
    return photo, about, [scale, colors, tile, seed, format]


def _results() -> list[gr.components.Component]:
    """Slider, file and summary, in the order in which `Handlers` returns them."""
    slider = gr.ImageSlider(
        type="filepath",
        interactive=False,
        label="Preview",
        buttons=["fullscreen"],
        max_height=560,
        elem_id="result",
    )
    words = gr.HTML(elem_id="summary")
    file = gr.File(label="Result, full size and quality", interactive=False, height=100, elem_id="file")
    return [slider, file, words]


def serve_page(page: gr.Blocks, host: str, port: int, max_upload: int) -> None:
    """Starts the server in a thread.

    Args:
      max_upload: megabytes.

    Raises:
      UserError: the port is taken.
    """
    for name in ("no_proxy", "NO_PROXY"):  # Gradio asks its own server whether it is there
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), host, "localhost")))
    try:
        page.launch(
            server_name=f"[{host}]" if ":" in host else host,
            server_port=port,
            max_file_size=f"{max_upload}mb",
            theme=gr.themes.Default(
                font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
            ),
            css=_CSS,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            inline=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            enable_monitoring=False,
            run_history=False,
            footer_links=[],
            i18n=gr.I18n(en=_WORDS),
        )
    except OSError:
        raise UserError(f"--port {port}: the server cannot listen on it; choose another") from None
