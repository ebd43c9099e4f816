"""Measure translation after fine-tuning: BLEU and chrF of a recipe's model, its quantized forms and its teacher.

    pip install -e ".[examples,metrics]"
    python examples/recipes/translation.py runs/whisper-lm-135m                # the output of a recipe

`examples/translate.py` fine-tunes the dense teacher and the model to translate verses from English into Spanish, and
scores whole books that are held out. Its arguments can be given after `--`. The fine-tuned model is then quantized and
scored again. Passages of a few verses fit into the sparse budget, so the scores compare what the models have learnt,
not their attention.

Earlier results are kept, and an interrupted run resumes.
"""

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

import torch
from transformers import TrainingArguments
from transformers.utils import logging

from examples import translate
from examples.recipes.measure import DENSE, device
from examples.recipes.recipe import DTYPE, HALF, RECIPES, SPARSE, load_in, teacher_source
from whisper_hf.cards.results import Record, load_results, save_results
from whisper_hf.quantization import quantize

TASK, DATASET = "translation after tuning", "verses from English into Spanish, whole books held out"


def tune(model: str, output: Path, options: argparse.Namespace) -> None:
    """Fine-tune a model by `translate.py` in a process of its own, and save it with the merged adapter."""
    if (output / translate.RESULTS).exists():
        return
    command = [sys.executable, str(Path(translate.__file__)), "--model", model, "--output_dir", str(output)]
    command += [
        "--sparse_attention",
        json.dumps(SPARSE),
        "--save",
        "merged",
        "--resume_from_checkpoint",
        "last",
    ]
    command += ["--max_steps", str(options.steps), "--eval_examples", str(options.passages), "--samples", "0"]
    command += ["--bf16"] * HALF + ["--use_cpu"] * (not torch.cuda.is_available())
    subprocess.run([*command, *options.more], check=True)


def scores(name: str, tuned: Path, form: str | None = None) -> list[Record]:
    """Return BLEU and chrF of a fine-tuned model, or of its quantized form."""
    known = json.loads((tuned / translate.TRANSLATIONS).read_text(encoding="utf-8"))
    found = known["scores"]["after"]
    if form is not None:
        folder = tuned / form
        if not folder.exists():
            quantize(tuned, folder, RECIPES[form], text=None)
        model = load_in(DTYPE, folder)
        task = translate.Task(translate.load_tokenizer(str(tuned)), known["script"]["target_language"])
        sources, references = ([sample[side] for sample in known["samples"]] for side in ("source", "reference"))
        args = TrainingArguments("unused", per_device_eval_batch_size=16, report_to="none")
        longest = known["script"]["max_new_tokens"]
        found = translate.score(translate.translate(model, task, sources, args, longest), references)
    return [Record(name, TASK, DATASET, title, found[key]) for key, title in (("bleu", "BLEU"), ("chrf", "chrF"))]


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; the arguments after `--` are for `translate.py`."""
    own = sys.argv[1:]
    more: list[str] = []
    if "--" in own:
        cut = own.index("--")
        more = own[cut + 1 :]
        own = own[:cut]
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("made", type=Path, help="output folder of a recipe")
    add("--teacher", help="path or Hub id of the teacher (default: SmolLM2-135M-Instruct)")
    add("--output", type=Path, help="folder of the results file (default: results, beside the models)")
    add("--steps", type=int, default=30, help="steps of fine-tuning (default: %(default)s)")
    add("--passages", type=int, default=8, help="passages to translate (default: %(default)s)")
    options = parser.parse_args(own)
    options.output = options.output or options.made / "results"
    options.more = more
    return options


def main() -> None:
    """Fine-tune and score the models that have no results yet."""
    options = parse_arguments()
    logging.disable_progress_bar()
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "translation.json"
    name = options.made.name
    records = list(load_results(path).records) if path.exists() else []
    teacher = teacher_source(options.teacher)
    for base, model in ((DENSE, teacher), (name, str(options.made / "model"))):
        tuned = options.made / ("translation-teacher" if base == DENSE else "translation")
        tune(model, tuned, options)
        for form in (None, *RECIPES):
            column = base if form is None else f"{base} {form}"
            if column not in {record.model for record in records} and (base == name or form is None):
                records += scores(column, tuned, form)
                save_results(path, records, command=shlex.join(["python", *sys.argv]), device=device(DTYPE))


if __name__ == "__main__":
    main()
