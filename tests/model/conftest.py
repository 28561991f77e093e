"""What several tests of the model share."""

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model


@pytest.fixture(scope="package")
def dinov2(tmp_path_factory) -> str:
    """A folder with a DINOv2 of one layer and random weights."""
    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(3)
    config = Dinov2Config(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder)
    return str(folder)
