"""Train and measure gradients in each of two processes, for `test_processes.py`; write `FOLDER/result.json`."""

import json
from pathlib import Path

import torch
from torch.distributed.fsdp import fully_shard

from whisper_hf.distillation.forward import Batch, DistillationForward
from whisper_hf.distillation.head_replacement import HeadReplacement

from ..distillation.test_trainer import KINDS, TERMS, config, examples, pad, student_model, teacher_model, train


def trained(folder: str, options: dict) -> dict:
    """Train with half of each batch, and return metrics, history and weights, which one process would also get."""
    sizes = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 2}
    trainer = train(examples(), folder, **options, **sizes)
    weights = {name: p.double().sum().item() for name, p in trainer.model.named_parameters()}
    return {"metrics": trainer.evaluate(), "history": trainer.state.log_history, "weights": weights}


def sharded_gradients(folder: str) -> dict[str, float]:
    """Return the squared norm of each gradient of a student that, like its teacher, is sharded by FSDP 2."""
    student, teacher = student_model(), teacher_model()
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    for model in (student, teacher):
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard([model.model.norm, model.lm_head], mesh=mesh)
        fully_shard(model, mesh=mesh)
    first = 4 * torch.distributed.get_rank()
    batch = Batch.split(pad([examples()[i] for i in range(first, first + 4)]), "labels")
    run = DistillationForward(config(folder, **TERMS), teacher, teacher, None)
    losses = run(student, student, HeadReplacement(student), batch)
    (2 * losses.loss / 100).backward()
    return {name: p.grad.full_tensor().double().square().sum().item() for name, p in student.named_parameters()}


def work(folder: str) -> None:
    """Train in all ways, and write the results to `result.json` in a folder."""
    found = {kind: trained(folder, options) for kind, options in KINDS.items()}
    found["sharded"] = sharded_gradients(folder)
    if torch.distributed.get_rank() == 0:
        (Path(folder) / "result.json").write_text(json.dumps(found))
