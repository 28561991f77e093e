"""Names and shapes of published checkpoints, written down as facts: what the index files of each
family list."""

LLAMA = {
    "7b": {"hidden": 4096, "intermediate": 11008, "layers": 32, "heads": 32},
    "13b": {"hidden": 5120, "intermediate": 13824, "layers": 40, "heads": 40},
}
SAM_SIZES = {
    "vit_b": (768, 12, (2, 5, 8, 11)),
    "vit_l": (1024, 24, (5, 11, 17, 23)),
    "vit_h": (1280, 32, (7, 15, 23, 31)),
}


def llama(size: str, rows: int) -> dict[str, tuple]:
    """A LLaMA's weights under the names of its authors' port to transformers; ``rows`` of the token
    table."""
    d, m, layers = (LLAMA[size][key] for key in ("hidden", "intermediate", "layers"))
    names = {
        "model.embed_tokens.weight": (rows, d),
        "model.norm.weight": (d,),
        "lm_head.weight": (rows, d),
    }
    for i in range(layers):
        block = f"model.layers.{i}"
        names |= {f"{block}.self_attn.{p}_proj.weight": (d, d) for p in "qkvo"}
        names |= {f"{block}.mlp.gate_proj.weight": (m, d), f"{block}.mlp.up_proj.weight": (m, d)}
        names |= {f"{block}.mlp.down_proj.weight": (d, m)}
        names |= {
            f"{block}.input_layernorm.weight": (d,),
            f"{block}.post_attention_layernorm.weight": (d,),
        }
    return names


def projector(size: str, mlp: bool) -> dict[str, tuple]:
    """LLaVA v1's linear projector, or v1.5's two layers with GELU between them."""
    d = LLAMA[size]["hidden"]
    if not mlp:
        return {"model.mm_projector.weight": (d, 1024), "model.mm_projector.bias": (d,)}
    return {
        "model.mm_projector.0.weight": (d, 1024),
        "model.mm_projector.0.bias": (d,),
        "model.mm_projector.2.weight": (d, d),
        "model.mm_projector.2.bias": (d,),
    }


def clip_large(pixels: int) -> dict[str, tuple]:
    """CLIP ViT-L/14's vision tower at 224 or 336 pixels, under the names of LLaVA's checkpoints."""
    root = "model.vision_tower.vision_tower.vision_model"
    names = {
        f"{root}.embeddings.class_embedding": (1024,),
        f"{root}.embeddings.patch_embedding.weight": (1024, 3, 14, 14),
        f"{root}.embeddings.position_embedding.weight": ((pixels // 14) ** 2 + 1, 1024),
    }
    for norm in ("pre_layrnorm", "post_layernorm"):  # the first is misspelt in CLIP's port, too
        names |= {f"{root}.{norm}.weight": (1024,), f"{root}.{norm}.bias": (1024,)}
    for i in range(24):
        block = f"{root}.encoder.layers.{i}"
        for p in ("q_proj", "k_proj", "v_proj", "out_proj"):
            names |= {
                f"{block}.self_attn.{p}.weight": (1024, 1024),
                f"{block}.self_attn.{p}.bias": (1024,),
            }
        names |= {f"{block}.mlp.fc1.weight": (4096, 1024), f"{block}.mlp.fc1.bias": (4096,)}
        names |= {f"{block}.mlp.fc2.weight": (1024, 4096), f"{block}.mlp.fc2.bias": (1024,)}
        for norm in ("layer_norm1", "layer_norm2"):
            names |= {f"{block}.{norm}.weight": (1024,), f"{block}.{norm}.bias": (1024,)}
    return names


def sam(kind: str) -> dict[str, tuple]:
    """sam_vit_b_01ec64.pth, sam_vit_l_0b3195.pth and sam_vit_h_4b8939.pth."""
    return sam_encoder(kind) | sam_prompts() | sam_decoder()


def _linear(name: str, out: int, into: int) -> dict[str, tuple]:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def _norm(name: str, width: int) -> dict[str, tuple]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def sam_encoder(kind: str) -> dict[str, tuple]:
    width, depth, everywhere = SAM_SIZES[kind]
    heads = 12 if kind == "vit_b" else 16
    names = {
        "image_encoder.pos_embed": (1, 64, 64, width),
        "image_encoder.patch_embed.proj.weight": (width, 3, 16, 16),
        "image_encoder.patch_embed.proj.bias": (width,),
        "image_encoder.neck.0.weight": (256, width, 1, 1),
        "image_encoder.neck.2.weight": (256, 256, 3, 3),
    }
    names |= _norm("image_encoder.neck.1", 256) | _norm("image_encoder.neck.3", 256)
    for i in range(depth):
        block, side = f"image_encoder.blocks.{i}", 64 if i in everywhere else 14
        names |= _norm(f"{block}.norm1", width) | _norm(f"{block}.norm2", width)
        names |= {f"{block}.attn.rel_pos_{axis}": (2 * side - 1, width // heads) for axis in "hw"}
        names |= _linear(f"{block}.attn.qkv", 3 * width, width) | _linear(
            f"{block}.attn.proj", width, width
        )
        names |= _linear(f"{block}.mlp.lin1", 4 * width, width) | _linear(
            f"{block}.mlp.lin2", width, 4 * width
        )
    return names


def sam_prompts() -> dict[str, tuple]:
    root = "prompt_encoder"
    names = {f"{root}.point_embeddings.{i}.weight": (1, 256) for i in range(4)}
    names |= {f"{root}.{name}.weight": (1, 256) for name in ("not_a_point_embed", "no_mask_embed")}
    names |= {f"{root}.pe_layer.positional_encoding_gaussian_matrix": (2, 128)}
    for layer, shape in ((0, (4, 1, 2, 2)), (3, (16, 4, 2, 2)), (6, (256, 16, 1, 1))):
        names |= {
            f"{root}.mask_downscaling.{layer}.weight": shape,
            f"{root}.mask_downscaling.{layer}.bias": shape[:1],
        }
    return names | _norm(f"{root}.mask_downscaling.1", 4) | _norm(f"{root}.mask_downscaling.4", 16)


def sam_decoder() -> dict[str, tuple]:
    root = "mask_decoder"
    names = {f"{root}.iou_token.weight": (1, 256), f"{root}.mask_tokens.weight": (4, 256)}
    attentions = [
        f"layers.{i}.{kind}"
        for i in range(2)
        for kind in ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token")
    ]
    for name in (*attentions, "final_attn_token_to_image"):
        inner = 256 if name.endswith("self_attn") else 128
        for p in ("q_proj", "k_proj", "v_proj"):
            names |= _linear(f"{root}.transformer.{name}.{p}", inner, 256)
        names |= _linear(f"{root}.transformer.{name}.out_proj", 256, inner)
    for i in range(2):
        layer = f"{root}.transformer.layers.{i}"
        names |= _linear(f"{layer}.mlp.lin1", 2048, 256) | _linear(f"{layer}.mlp.lin2", 256, 2048)
        for k in range(1, 5):
            names |= _norm(f"{layer}.norm{k}", 256)
    names |= _norm(f"{root}.transformer.norm_final_attn", 256)
    names |= {
        f"{root}.output_upscaling.0.weight": (256, 64, 2, 2),
        f"{root}.output_upscaling.0.bias": (64,),
    }
    names |= {
        f"{root}.output_upscaling.3.weight": (64, 32, 2, 2),
        f"{root}.output_upscaling.3.bias": (32,),
    }
    names |= _norm(f"{root}.output_upscaling.1", 64)
    for i in range(4):
        mlp = f"{root}.output_hypernetworks_mlps.{i}.layers"
        names |= (
            _linear(f"{mlp}.0", 256, 256)
            | _linear(f"{mlp}.1", 256, 256)
            | _linear(f"{mlp}.2", 32, 256)
        )
    head = f"{root}.iou_prediction_head.layers"
    return (
        names
        | _linear(f"{head}.0", 256, 256)
        | _linear(f"{head}.1", 256, 256)
        | _linear(f"{head}.2", 4, 256)
    )


def lisa(size: str, rows: int, pixels: int, mlp: bool, kind: str = "vit_h") -> dict[str, tuple]:
    """A whole LISA: LLaVA, SAM and the text projection."""
    d = LLAMA[size]["hidden"]
    names = llama(size, rows) | projector(size, mlp) | clip_large(pixels)
    names |= {f"model.visual_model.{name}": shape for name, shape in sam(kind).items()}
    return (
        names
        | _linear("model.text_hidden_fcs.0.0", d, d)
        | _linear("model.text_hidden_fcs.0.2", 256, d)
    )
