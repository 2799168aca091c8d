"""How `--help` arranges each command's flags: title -> flags. Required flags have a group of their own, above these."""

from __future__ import annotations

from tsdsr_jax.cli_help import Groups

_MODEL = ("pretrained_model_name_or_path", "revision", "variant")

UPSCALING: Groups = {
    "input and output": ("output_dir", "format", "scale_in_names", "overwrite", "report"),
    "page": ("host", "port", "max_upload", "max_waiting"),
    "model": (*_MODEL, "lora_dir", "lora_scale", "rank", "rank_vae", "embedding_dir"),
    "picture": ("upscale", "align_method", "seed", "latent", "process_size"),
    "memory and speed": (
        "mixed_precision", "weights", "is_use_tile", "vae_encoder_tiled_size", "vae_decoder_tiled_size",
        "latent_tiled_size", "latent_tiled_overlap", "tile_batch_size", "batch_size", "max_pixels",
    ),
    "devices": ("device", "shard"),
}  # fmt: skip

TRAINING: Groups = {
    "model": (*_MODEL, "checkpoint_path", "teacher_lora_path", "use_teacher_lora", "train", "from_scratch", "rank",
              "rank_vae", "rank_lora"),
    "data": ("data_dir", "hr_dir", "crop_size", "min_size", "small_photos", "photo_side", "sharpen_gt", "jpeg",
             "degradation_strength", "dataloader_num_workers", "max_bad_samples"),
    "prompts": ("default_embedding_dir", "null_embedding_dir", "use_default_prompt", "prompt_dropout"),
    "losses": ("lambda_tsd", "lambda_mse", "lambda_lpips", "lpips_path", "lambda_pixel", "lambda_gradient", "lambda_kl",
               "lambda_vsd", "guidance_scale", "latent_noise"),
    "adversarial": ("lambda_adv", "adversarial_start", "learning_rate_adv", "discriminator_width"),
    "trajectories": ("use_dasm", "dasm_points", "dasm_gamma", "dasm_stride", "use_random_bias"),
    "noise levels": ("first_index", "last_index", "weighting_scheme", "logit_mean", "logit_std", "mode_scale"),
    "optimizer": (
        "optimizer", "learning_rate", "learning_rate_reg", "lr_scheduler", "lr_warmup_steps", "lr_num_cycles",
        "lr_power", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "ema_decay",
    ),
    "run and checkpoints": (
        "output_dir", "resume_from_checkpoint", "max_train_steps", "num_train_epochs", "train_batch_size",
        "gradient_accumulation_steps", "seed", "checkpointing_steps", "checkpoints_total_limit", "max_bad_steps",
    ),
    "validation": ("validation_steps", "validation_dir", "num_validation_images", "sampling_steps",
                   "sampling_guidance"),
    "memory and speed": ("mixed_precision", "gradient_checkpointing", "split_guidance", "merge_teacher_lora", "scan_layers"),
    "devices and machines": ("fsdp", "multi_host", "coordinator_address", "num_processes", "process_id",
                             "join_timeout", "peer_timeout", "save_timeout"),
    "logging": ("report_to", "logging_steps", "profile_steps", "logging_dir", "log_name", "log_code"),
    "without effect": ("local_rank", "set_grads_to_none"),
}  # fmt: skip

PREPARING: Groups = {
    "input and output": ("output_dir", "layout", "samples_per_file", "preview", "preview_photos"),
    "photographs": ("crops", "crops_per_photo", "crop_size", "min_size", "small_photos", "photo_side", "sharpen_gt", "jpeg",
                    "degradation_strength", "seed"),
    "model": _MODEL,
    "prompts": ("prompts", "default_embedding_dir", "text_encoder_path", "no_t5", "max_sequence_length",
                "prompt_dtype", "prompt_device", "prompt_batch_size"),
    "speed and machines": ("batch_size", "dataloader_num_workers", "shard"),
}  # fmt: skip

EVALUATING: Groups = {
    "references and names": ("gt_imgs", "names"),
    "metrics": ("metrics", "compare", "niqe_params", "lpips_weights"),
    "output": ("log", "log_name", "overwrite", "report", "lr_imgs"),
    "memory, devices and machines": ("device", "max_pixels", "shard"),
}

ENCODING: Groups = {
    "what to convert or encode": ("input", "default", "null", "prompt", "prompt_file", "overwrite"),
    "text encoders": (*_MODEL, "no_t5", "max_sequence_length"),
    "memory and devices": ("dtype", "device", "batch_size"),
}
