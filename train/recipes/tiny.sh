#!/usr/bin/env bash
# Trains a model like weights/tiny from scratch, on photographs only: autoencoder, teacher, student.
#
#   train/recipes/tiny.sh --photos PHOTOS --validation OTHERS --output runs/tiny --budget cpu
#
#   --photos      folder of photographs; repeat for several, which give equally many crops
#   --validation  folder of other photographs, to validate the autoencoder during training; up to 32 of them also serve to
#                 measure the scaling factor of the latents
#   --output      folder for everything; finished stages are not repeated, and an interrupted stage continues
#   --budget      cpu: about three hours on two quiet cores; lease: ten minutes of a large GPU, never tried;
#                 minimal: to see it run. It changes only numbers of steps, crops and batch sizes.
#   --seed        seed of the student's last stage (default 0); students share all stages before it
#   --student     losses of the student after its start with MSE: pixel (the default), mse, tsd, dasm, adv (pixel and a
#                 discriminator) or full (dasm, pixel and the discriminator)
#
# PYTHON names the interpreter. Default: that of .venv, if `make` has made one.
#
# The result, OUTPUT/model-STUDENT-SEED, has the files of weights/tiny and is used like it:
#
#   python infer/upscale.py --pretrained_model_name_or_path OUTPUT/model-pixel-0 --lora_dir OUTPUT/model-pixel-0/lora \
#     --embedding_dir OUTPUT/model-pixel-0/prompt/default -i PHOTOS -o RESULTS
#
# The complete command is printed at the end.
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname -- "$0")/../.." && pwd)

fail() { echo "tiny.sh: $*" >&2; exit 2; }
# An existing folder, always in the same spelling.
folder() { (CDPATH='' cd -- "$2" 2>/dev/null && pwd -P) || fail "$1 $2: no such folder"; }
absolute() { case "$1" in /*) printf '%s' "$1" ;; *) printf '%s' "$PWD/$1" ;; esac; }

photos=() folders=() validation="" output="" budget=cpu seed=0 student=pixel
while (($#)); do
  case "$1" in -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p;}' "$0"; exit 0 ;; esac
  (($# > 1)) || fail "$1: needs a value"
  case "$1" in
    --photos) found=$(folder "$1" "$2"); photos+=(--hr_dir "$found") folders+=("$found") ;;
    --validation) validation=$(folder "$1" "$2") ;;
    --output) output=$(absolute "$2") ;;
    --budget) budget=$2 ;;
    --seed) seed=$2 ;;
    --student) student=$2 ;;
    *) fail "$1: no such flag; --help explains them" ;;
  esac
  shift 2
done
((${#photos[@]})) && [[ $validation && $output ]] || fail "give --photos, --validation and --output"
[[ $seed =~ ^[0-9]{1,9}$ ]] || fail "--seed $seed: expected a whole number"

# Steps and batch size of each stage, crops of each folder; of the last stage without a discriminator and with one, and from
# which step on that moves the student.
case "$budget" in
  cpu)     ae=(5000 4)  large=(2000 1) crops=1600 base=(2500 32)  lora=(100 32) start=(600 8)   end=(1000 8)  end_adv=(2500 4 100) ;;
  lease)   ae=(6000 16) large=(2000 4) crops=8000 base=(5000 128) lora=(200 64) start=(1200 32) end=(2500 32) end_adv=(2500 32 100) ;;
  minimal) ae=(2 2)     large=(2 1)    crops=4    base=(2 2)      lora=(2 2)    start=(2 2)     end=(2 2)     end_adv=(2 2 1) ;;
  *) fail "--budget $budget: expected cpu, lease or minimal" ;;
esac
# The auxiliary network learns from the first student on, so that TSD can begin with it. Ends without TSD leave it out.
auxiliary=(--learning_rate_reg 1e-3) without_tsd=(--lambda_tsd 0 --learning_rate_reg 0)
# With an MSE weight of 1, TSD has no visible effect; with 0, the student gets lost. Near this value small changes matter
# (docs/tiny.md), so the moving average of the student is used.
tsd=("${auxiliary[@]}" --lambda_tsd 1 --lambda_mse 0.15 --lambda_vsd 0.5 --first_index 300)
dasm=("${tsd[@]}" --use_dasm --use_random_bias)
strength=1 ema=0.98 rate=(--learning_rate 2e-4) falling=(--learning_rate 5e-4 --lr_scheduler cosine --lr_warmup_steps 20)
# Against a discriminator a student swings between patterns; its average over some hundred steps has none (docs/tiny.md).
adversary=(--lambda_adv 0.06 --adversarial_start "${end_adv[2]}" --discriminator_width 32
  --learning_rate_adv 2e-4)
against=(--learning_rate 3e-4 --lr_scheduler cosine --lr_warmup_steps 20)
case "$student" in
  pixel) losses=("${without_tsd[@]}" --lambda_mse 0.1 --lambda_pixel 1) rate=("${falling[@]}") strength=1.4 ;;
  mse)   losses=("${without_tsd[@]}") rate=("${falling[@]}") ;;
  tsd)   losses=("${tsd[@]}") ;;
  dasm)  losses=("${dasm[@]}") ;;
  adv)   losses=("${without_tsd[@]}" --lambda_mse 0.05 --lambda_pixel 1 "${adversary[@]}") ;;
  full)  losses=("${dasm[@]}" --lambda_pixel 1 "${adversary[@]}") ;;
  *) fail "--student $student: expected pixel, mse, tsd, dasm, adv or full" ;;
esac
case "$student" in adv | full) end=("${end_adv[@]:0:2}") ema=0.99 rate=("${against[@]}") ;; esac

python=${PYTHON:-}
if [[ -z $python ]]; then
  if [[ -x $root/.venv/bin/python ]]; then python=$root/.venv/bin/python; else python=python3; fi
elif [[ $python == */* ]]; then
  python=$(absolute "$python")
fi
# The scripts run in the user's folder, so that the commands they print work there.
"$python" -c 'import flax, grain, jax, optax' 2>/dev/null ||
  fail "$python: lacks what tsdsr_jax needs; install it there, or name another interpreter with PYTHON"
# Otherwise the pictures of one stage would be photographs of the next.
output=$("$python" -c 'import os, sys; print(os.path.realpath(sys.argv[1]))' "$output")
for used in "$validation" "${folders[@]}"; do
  [[ $output/ != "$used"/* ]] || fail "--output $output: lies in the photographs of $used; choose another folder"
done

# Another budget would continue in these folders, and delete the first one's results.
mkdir -p -- "$output"
described="$budget ${photos[*]} --validation $validation"
if [[ -f $output/recipe ]]; then
  [[ $(<"$output/recipe") == "$described" ]] ||
    fail "$output: belongs to --budget, --photos and --validation $(<"$output/recipe"); choose another --output"
else
  printf '%s\n' "$described" >"$output/recipe"
fi

weights=$root/weights/tiny
prompts=(--default_embedding_dir "$weights/prompt/default" --null_embedding_dir "$weights/prompt/null")
# Crops of photographs of one scale, about that of what people upscale: small ones are enlarged, large ones shrunk.
scale=(--photo_side 700 1000)
crop=(--crop_size 128 --min_size 128 "${scale[@]}")
# The autoencoder learns photographs as they are; the student's targets are sharpened, as TSD-SR's.
rebuilding=("${photos[@]}" --validation_dir "$validation" --num_validation_images 16 "${scale[@]}" --no_sharpen_gt
  --latent_noise 0.25 --lambda_kl 1e-5 --optimizer muon --learning_rate 5e-4 --lr_scheduler cosine
  --adam_weight_decay 0 --ema_decay 0.998)
common=(--mixed_precision no --resume_from_checkpoint latest --checkpoints_total_limit 2)

say() { printf '\n== %s\n' "$*"; }
steps() { printf '%07d' "$1"; }
# train SCRIPT STEPS BATCH FLAG...: trains, with a checkpoint and pictures ten times during the run.
train() {
  local script=$1 count=$2 batch=$3; shift 3
  local every=$(((count + 9) / 10))
  "$python" "$root/train/$script.py" "${common[@]}" --max_train_steps "$count" --train_batch_size "$batch" \
    --checkpointing_steps "$every" --validation_steps "$every" "$@"
}

say "autoencoder: ${ae[0]} steps of ${ae[1]} crops"
made=$output/autoencoder/checkpoint_$(steps "${ae[0]}")/model/ema/vae
[[ -d $made ]] || train autoencoder "${ae[@]}" --vae_dir "$weights/vae" --from_scratch "${rebuilding[@]}" --crop_size 96 \
  --min_size 96 --lr_warmup_steps 100 --output_dir "$output/autoencoder"

# Group norms meet other statistics in whole photographs than in small crops.
say "autoencoder, larger crops: ${large[0]} steps of ${large[1]}"
small=$made
made=$output/large/checkpoint_$(steps "${large[0]}")/model/ema/vae
[[ -d $made ]] || train autoencoder "${large[@]}" --vae_dir "$small" "${rebuilding[@]}" --crop_size 256 --min_size 128 \
  --lr_warmup_steps 50 --output_dir "$output/large"

# The scaling factor was measured with it. Of the transformer there is only a config yet.
mkdir -p "$output/new/transformer"
cp -r "$made" "$weights/scheduler" "$output/new"
cp "$weights/transformer/config.json" "$output/new/transformer"

pairs=()
for folder in "${folders[@]}"; do
  count=$("$python" -c '
import sys
from pathlib import Path
from tsdsr_jax.images.search import find_photographs
print(len(find_photographs(Path(sys.argv[1])).files))' "$folder")
  each=$(((crops + count - 1) / count))
  set=$output/pairs-$((${#pairs[@]} / 2))
  pairs+=(--data_dir "$set")
  say "training set: $each crops of each of the $count photographs in $folder, degraded and encoded"
  "$python" "$root/train/prepare.py" --hr_dir "$folder" --output_dir "$set" --pretrained_model_name_or_path "$output/new" \
    --default_embedding_dir "$weights/prompt/default" --crops_per_photo "$each" --degradation_strength camera "${crop[@]}"
done

say "teacher, from scratch: ${base[0]} steps of ${base[1]}"
model=$output/base/checkpoint_$(steps "${base[0]}")/model/ema
[[ -d $model ]] || train teacher "${base[@]}" --train base --from_scratch --pretrained_model_name_or_path "$output/new" \
  "${pairs[@]}" "${prompts[@]}" --optimizer muon --learning_rate 4e-3 --lr_scheduler cosine \
  --lr_warmup_steps 100 --adam_weight_decay 0 --ema_decay 0.998 --output_dir "$output/base"

say "teacher's LoRA: ${lora[0]} steps of ${lora[1]}"
teacher=$output/teacher/checkpoint_$(steps "${lora[0]}")/lora
[[ -d $teacher ]] || train teacher "${lora[@]}" --pretrained_model_name_or_path "$model" "${pairs[@]}" \
  "${prompts[@]}" --rank 16 --learning_rate 1e-4 --output_dir "$output/teacher"

distil=(--pretrained_model_name_or_path "$model" "${pairs[@]}" "${prompts[@]}" --use_default_prompt
  --use_teacher_lora --teacher_lora_path "$teacher" --merge_teacher_lora --lambda_lpips 0 --guidance_scale 1 --rank_lora 64
  --num_validation_images 8)

say "student, MSE only: ${start[0]} steps of ${start[1]}"
begun=$output/start/checkpoint_$(steps "${start[0]}")/lora
[[ -d $begun ]] || train distill "${start[@]}" "${distil[@]}" "${auxiliary[@]}" --lambda_tsd 0 --learning_rate 1e-3 \
  --lr_scheduler cosine --lr_warmup_steps 50 --output_dir "$output/start"

say "student, $student: ${end[0]} steps of ${end[1]}"
student_lora=$output/student-$student-$seed/checkpoint_$(steps "${end[0]}")/lora/ema
[[ -d $student_lora ]] || train distill "${end[@]}" "${distil[@]}" "${losses[@]}" "${rate[@]}" \
  --checkpoint_path "$begun" --ema_decay "$ema" --seed "$seed" \
  --output_dir "$output/student-$student-$seed"

say "collecting"
result=$output/model-$student-$seed
rm -rf -- "$output/collected"
mkdir -p "$output/collected/loras" "$output/collected/teacher"
cp "$student_lora/transformer.safetensors" "$student_lora/vae.safetensors" "$output/collected/loras"
cp "$teacher/teacher.safetensors" "$output/collected/teacher"
"$python" "$root/convert/sd3.py" --input "$model" --output "$output/collected/base"
"$python" "$root/convert/sd3.py" --input "$output/collected/base" --to_diffusers --dtype float16 --overwrite --output "$result"
# lora FROM TO FLAG...: writes LoRAs in PEFT's layout, in float16.
lora() {
  "$python" "$root/convert/lora.py" --input "$1" --output "$1-ours" --base "$model" --dtype float16 "${@:3}"
  "$python" "$root/convert/lora.py" --input "$1-ours" --output "$2" --base "$model" --overwrite
}
# Losses of pixels and latents favor blurred results; a stronger adapter makes edges crisp again (docs/tiny.md).
lora "$output/collected/loras" "$result/lora" --lora_scale "$strength"
lora "$output/collected/teacher" "$result/teacher"
cp -r "$weights/prompt" "$result"
rm -rf -- "$output/collected"
echo "made $result"
"$python" -c '
import sys
from pathlib import Path
from tsdsr_jax import hints
model = Path(sys.argv[1])
flags = {"pretrained_model_name_or_path": model, "lora_dir": model / "lora", "embedding_dir": model / "prompt/default"}
results = hints.new_folder(model, "upscaled")
print("upscale with it:", hints.command("infer/upscale.py", **flags, input_dir=hints.PHOTOS, output_dir=results))
' "$result"
