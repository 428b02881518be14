"""Weights of a trained model, as plain tensors."""

from conversion.tensors import Stored
from conversion.weights import entries
from training.checkpoint import format
from training.checkpoint.stage_folder import StageFolder
from training.config.shape import Shape
from training.trainer.step import build_model


def weights(config, stage, head: str) -> tuple[dict, tuple]:
    """A stage's last checkpoint as Hugging Face names it, and its scalar head."""
    shape = Shape.read(config.paths.model)
    model = build_model(shape, config, head)
    format.load_weights(StageFolder(stage).resolve() / "model", model)
    held = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    body = {}
    for entry in entries(shape):
        body |= entry.unwoven(Stored.of_tensor(held[entry.parameter][: entry.weight.size[0]]))
    body = {name: tensor.load() for name, tensor in body.items()}
    return body, tuple(value for name, value in held.items() if name.startswith("score."))
