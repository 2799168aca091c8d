"""The shapes that are written down are those of the networks."""

from functools import partial

import jax
import pytest

from tsdsr_jax.models.mmdit import MMDiTConfig
from tsdsr_jax.models.params import Config, abstract_params, init_params
from tsdsr_jax.models.vae import VAEConfig

CONFIGS = {
    "SD3": MMDiTConfig.sd3_medium(),
    "SD3.5": MMDiTConfig.tiny(num_layers=5, qk_norm="rms_norm", dual_attention_layers=(0, 1)),
    "dual attention at the end": MMDiTConfig.tiny(dual_attention_layers=(2,)),
    "no queries' norm": MMDiTConfig.tiny(dual_attention_layers=(1,)),
    "other channels": MMDiTConfig.tiny(in_channels=4, out_channels=8, patch_size=4),
    "one layer": MMDiTConfig.tiny(num_layers=1, qk_norm="rms_norm"),
    "two layers": MMDiTConfig.tiny(num_layers=2),
    "SD3's autoencoder": VAEConfig.sd3(),
    "tiny autoencoder": VAEConfig.tiny(),
    "uneven autoencoder": VAEConfig.tiny(
        block_out_channels=(8, 16, 16, 32, 64), layers_per_block=1, latent_channels=4
    ),
    "no layers": VAEConfig.tiny(block_out_channels=(4, 4, 4, 4), layers_per_block=0, norm_num_groups=2),
    "one level": VAEConfig.tiny(block_out_channels=(16,), layers_per_block=3, in_channels=4, out_channels=5),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_equal_to_what_flax_finds(config: Config) -> None:
    traced = jax.eval_shape(partial(init_params, config), jax.random.key(0))
    assert abstract_params(config) == traced
