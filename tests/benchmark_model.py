"""A model of the published layout and a hundred thousandth of its cost, for the benchmarks of the whole step."""

import torch

from modeling_fvlm import FVLMConfig, FVLMModel


def narrow_model(num_organs: int) -> FVLMModel:
    """Crop, patches, vocabulary and dropout as in benchmarks/inputs.py; two narrow blocks in each tower."""
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = FVLMConfig(
        organs=[f"organ_{number}" for number in range(num_organs)],
        vision_config={"volume_size": (112, 256, 352), "hidden_dropout": 0.1, "feature_levels": [0], **small},
        text_config={"model_type": "bert", "vocab_size": 30522, **small},
        text_token_types=False,
        pooling_num_heads=2,
        pooling_dropout=0.1,
        projection_dim=8,
    )
    torch.manual_seed(0)
    model = FVLMModel(config).train()
    torch.nn.init.normal_(model.organ_pooling.query_tokens, std=0.5)
    return model
