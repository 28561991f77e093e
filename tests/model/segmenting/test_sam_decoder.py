"""The rearranged mask decoder equals segment-anything's own, gradients included."""

import pytest
import torch

from cores.model.segmenting.decoder import to_pixels, to_places
from cores.model.segmenting.sam import build_sam, decode_masks, mask_prompt, position_encoding
from tests.helpers import SAM_DIMS, randomise


def two_levels(sam, images, index, tokens, own: bool):
    """Logits and IoU of two targets per image, the second mask prompted by the first; ``own``:
    segment-anything's code."""

    def decode(token, dense):
        if not own:
            return decode_masks(sam, images[index], token, dense)
        position = position_encoding(sam).to(images.dtype)
        parts = [
            sam.mask_decoder(images[i][None], position, token[k][None], dense[k][None], False)
            for k, i in enumerate(index)
        ]
        return torch.cat([m[:, 0] for m, _ in parts]), torch.cat([iou[:, 0] for _, iou in parts])

    no_mask = sam.prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(
        len(index), -1, 4, 4
    )
    first, _ = decode(tokens[:, :1], no_mask)
    dense = sam.prompt_encoder.mask_downscaling(first[:, None]) if own else mask_prompt(sam, first)
    second, iou = decode(tokens[:, 1:], dense)
    return first, second, iou


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_two_levels_equal_segment_anything(dtype, tolerance):
    torch.manual_seed(0)
    sam = build_sam(SAM_DIMS).to(dtype)
    randomise(sam, scale=0.2)
    index = [0, 1, 1]
    results = []
    for own in (True, False):
        sam.zero_grad()
        torch.manual_seed(1)
        images = torch.randn(2, 32, 4, 4, dtype=dtype, requires_grad=True)
        tokens = torch.randn(3, 2, 32, dtype=dtype, requires_grad=True)
        outputs = two_levels(sam, images, index, tokens, own)
        sum(o.square().sum() for o in outputs).backward()
        weights = [
            p.grad
            for part in (sam.mask_decoder, sam.prompt_encoder.mask_downscaling)
            for p in part.parameters()
        ]
        results.append(
            [
                *outputs,
                images.grad,
                tokens.grad,
                *(torch.zeros(1) if g is None else g for g in weights),
            ]
        )
    scale = max(float(g.abs().max()) for g in results[0][3:])
    for theirs, ours in zip(*results, strict=True):
        theirs, ours = theirs.detach(), ours.detach()
        assert (theirs - ours).abs().max() <= tolerance * max(
            float(theirs.abs().max()), scale / 1000
        )


def test_every_weight_of_the_single_mask_takes_part():
    """Ranks wait for each other's gradients, even for one that is zero: a bias on keys, which
    softmax cannot feel."""
    sam = build_sam(SAM_DIMS)
    masks, _ = decode_masks(
        sam, torch.randn(1, 32, 4, 4), torch.randn(1, 1, 32), torch.zeros(1, 32, 4, 4)
    )
    masks.sum().backward()
    unused = [name for name, p in sam.mask_decoder.named_parameters() if p.grad is None]
    assert all(
        name.startswith(("iou_prediction_head", "output_hypernetworks_mlps.")) for name in unused
    )
    assert not any(name.startswith("output_hypernetworks_mlps.0") for name in unused)


def test_places_and_pixels_are_inverse():
    masks = torch.arange(2 * 12 * 12).reshape(2, 12, 12)
    places = to_places(masks)
    assert torch.equal(to_pixels(places), masks)
    corner = masks[0, 4:8, 8:12]  # the place in row 1, column 2
    assert sorted(places[0, 5].flatten().tolist()) == sorted(corner.flatten().tolist())
    assert places[0, 5, 1].tolist() == corner[:2, 2:].flatten().tolist()
