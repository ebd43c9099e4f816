"""Write the model card of a model that a recipe made, from its results files, with the checksums of all weights.

    python examples/recipes/card.py runs/whisper-lm-135m model_cards/whisper-lm-135m         # some seconds

The first argument is the output of a recipe, which `measure.py` and `translation.py` have measured. The target folder
gets the results files, the config, `SHA256SUMS` and `README.md`. With `--repo-id YOU/NAME` the card can be pushed
beside the weights.
"""

import argparse
import shutil
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from transformers import AutoConfig, AutoModelForCausalLM

from examples.recipes.recipe import RECIPES, TEACHER
from whisper_hf import model_card

TASKS = ("perplexity", "retrieval", "repetition", "translation", "size", "speed")  # in the order of their tables
CONFIG, SUMS = "config.json", "SHA256SUMS"
SCRIPTS = {"whisper-lm-135m": "whisper_lm_135m.py", "whisper-lm-mini": "whisper_lm_mini.py --baselines"}
WORKS = (
    "Nothing was trained on the works that it is measured on. The novel is Northanger Abbey by Jane Austen, and the "
    "program text is the modules tarfile and inspect of the Python library."
)
LIMITS = {
    "whisper-lm-135m": [
        WORKS,
        "It was adapted on three novels and on program text with hidden facts. The facts that it is measured with have "
        "the same wording, but other names and numbers, and are hidden in other works.",
        "The weights of the source had been rounded to few bits before, so that quantizing them again loses less than "
        "in other models.",
    ],
    "whisper-lm-mini": [
        WORKS,
        "It was trained on three novels and program text alone. It knows far less than its teacher, finds no facts far "
        "back, and cannot chat.",
        "The models without a teacher were trained on the same rows in as many steps: one from random weights, the "
        "other from the weights that were cut out of the teacher, with which this student began, too. The comparison "
        "with the second shows what distillation is worth.",
    ],
}


def write_card(folder: Path, name: str, teacher: str = TEACHER, repo_id: str | None = None) -> ModelCard:
    """Make the card of a model from a folder with its config and results files."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):  # on the meta device, as a card needs no weights
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    commands = [f"python examples/recipes/{SCRIPTS.get(name, 'RECIPE')}"]
    commands += [f"python examples/recipes/{script}.py runs/{name}" for script in ("measure", "translation")]
    known = {"name": name, "license": "apache-2.0", "commands": commands, "base_model": teacher, "repo_id": repo_id}
    results = [file for task in TASKS if (file := folder / f"{task}.json").exists()]
    return model_card(model, results, **known, limits=LIMITS.get(name, []))


def checksums(made: Path) -> str:
    """Return the checksums of all files of weights of a model and its quantized forms, as `sha256sum` writes them."""
    folders = ["model", *(f"model-{form}{part}" for form in RECIPES for part in ("", "-adapter"))]
    known = [(folder, (made / folder / SUMS).read_text(encoding="utf-8").splitlines()) for folder in folders]
    return "".join(f"{line.replace('  ', f'  {folder}/')}\n" for folder, lines in known for line in lines)


def main() -> None:
    """Run the command line: write the card, and copy the files that belong to it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("made", type=Path, help="output folder of a recipe")
    parser.add_argument("target", type=Path, help="folder to write the card to")
    parser.add_argument("--results", type=Path, help="folder of results files (default: results, beside the models)")
    parser.add_argument("--teacher", default=TEACHER, help="Hub id of the teacher (default: %(default)s)")
    parser.add_argument("--repo-id", help="Hub id under which the model will be published")
    options = parser.parse_args()
    options.target.mkdir(parents=True, exist_ok=True)
    results = options.results or options.made / "results"
    if results.resolve() != options.target.resolve():
        for file in (results / f"{task}.json" for task in TASKS):
            if file.exists():
                shutil.copy(file, options.target)
    shutil.copy(options.made / "model" / CONFIG, options.target)
    (options.target / SUMS).write_text(checksums(options.made), encoding="utf-8")
    write_card(options.target, options.made.name, options.teacher, options.repo_id).save(options.target / "README.md")


if __name__ == "__main__":
    main()
