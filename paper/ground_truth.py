"""Makes the two ground truths: models retrained on subsets, and the losses of pictures under each of them.

    python paper/ground_truth.py emoji --pictures emoji16 --work work/emoji --workers 2
    python paper/ground_truth.py letters --work work/letters --workers 2

`emoji`: an unconditional DDPM, all weights fine-tuned; owners are four studios. `letters`: a StableDiffusionPipeline,
fine-tuned by LoRA with captions; owners are five type designers. Both can be stopped and run again. Losses that
`paper/truth/` holds are not measured again; `--verify N` retrains N of these models and compares.
"""

import argparse
import csv
import json
import shutil
import string
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from influence import evaluation, finetuning, keys, models, retraining, training, typefaces
from influence.finetuning import FineTune
from influence.retraining import Query, Run, Truth

PAPER = Path(__file__).parent
QUERIES = 32
HALVES, HALF_SEEDS, COALITION_SEEDS = 64, 2, 3
RECIPES = {
    "emoji": FineTune(epochs=24, batch_size=32, learning_rate=1.5e-3),
    "letters": FineTune(
        epochs=16,
        batch_size=16,
        learning_rate=2e-3,
        lora_rank=8,
        lora_targets="to_q,to_k,to_v,to_out.0,ff.net.0.proj,ff.net.2",
    ),
}


def rows(folder: Path) -> list[dict[str, str]]:
    """Of metadata.csv."""
    with (folder / "metadata.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def copy(chosen: list[dict[str, str]], source: Path, out: Path) -> None:
    """Write some pictures of a data set as a data set."""
    (out / "images").mkdir(parents=True)
    with (out / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(chosen[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(chosen)
    for row in chosen:
        shutil.copy(source / row["file_name"], out / row["file_name"])


def split(source: Path, work: Path, group: str, held_out: list[set[str]]) -> None:
    """Divide into `dataset`, `unseen` (queries) and `controls`, by a column: no group is in two of them."""
    table = rows(source)
    for name, groups in zip(("unseen", "controls"), held_out, strict=True):
        copy([row for row in table if row[group] in groups], source, work / name)
    copy([row for row in table if row[group] not in set.union(*held_out)], source, work / "dataset")


def emoji_pictures(pictures: Path, work: Path) -> None:
    """100 concepts to train on, 8 to ask about, 8 as controls."""
    concepts = sorted({row["concept"] for row in rows(pictures)}, key=lambda name: keys.digest("concept", name))
    split(pictures, work, "concept", [set(concepts[:8]), set(concepts[8:16])])


def letter_pictures(work: Path) -> None:
    """Five designers' capitals, small letters and digits; 7 characters to ask about, 7 as controls."""
    letters = string.ascii_uppercase + string.ascii_lowercase + string.digits
    typefaces.render(work / "all", typefaces.demo_fonts(), letters, size=32)
    table = rows(work / "all")
    order = sorted({row["text"].split()[1] for row in table}, key=lambda name: keys.digest("letter", name))
    for row in table:
        row["letter"] = row["text"].split()[1]
    copy(table, work / "all", work / "lettered")
    split(work / "lettered", work, "letter", [set(order[:7]), set(order[7:14])])


def chosen(folder: Path, kind: str, conditional: bool) -> list[Query]:
    """Some pictures of a data set as queries, evenly spread over its rows."""
    table = rows(folder)
    picked = [table[i] for i in np.linspace(0, len(table) - 1, QUERIES).round().astype(int)]
    return [Query(str(folder / row["file_name"]), kind, row["text"] if conditional else None) for row in picked]


def generated(work: Path, recipe: FineTune, base: Path, prompts: list[str] | None) -> list[Query]:
    """Pictures sampled from the fine-tuned model, with prompts of the training set if it reads any.

    Those that were measured are kept: on another processor a sample differs by a grey level in a pixel or two.
    """
    out, kept = work / "generated", base.parent / "generated"
    if not out.exists() and kept.exists():
        shutil.copytree(kept, out)
    if not out.exists():
        adapted = recipe.lora_rank is not None
        denoiser = models.load_denoiser(base if adapted else work / "model", lora=work / "model" if adapted else None)
        cond = None if prompts is None else torch.cat([denoiser.encode_captions([prompt]) for prompt in prompts])
        latents = training.generate(
            denoiser.network, denoiser.schedule, count=QUERIES, shape=denoiser.sample_shape, seed=0, cond=cond,
            clip=1.0 if prompts is None else None,
        )  # fmt: skip
        pixels = denoiser.decode_images(latents)
        out.mkdir()
        for i, image in enumerate(pixels):
            array = ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
            Image.fromarray(array).save(out / f"{i:02d}.png")
    return [
        Query(str(out / f"{i:02d}.png"), "generated", None if prompts is None else prompts[i]) for i in range(QUERIES)
    ]


def prepare(name: str, work: Path, pictures: Path | None) -> Truth:
    """Data set, fine-tuned model, queries: made where they are missing."""
    base, recipe = PAPER / "truth" / name / "base", RECIPES[name]
    conditional = name == "letters"
    if not (work / "dataset").exists():
        letter_pictures(work) if conditional else emoji_pictures(pictures, work)
    trained = chosen(work / "dataset", "trained", conditional)
    if not (work / "model").exists():
        truth = retraining.create(
            work / "fine-tune", base=base, dataset=work / "dataset", recipe=recipe, queries=trained
        )
        maker = retraining.Retrainer(truth)
        maker.retrain(Run("all", np.ones(len(truth.items), dtype=bool), 0))
        finetuning.save(maker.denoiser, recipe, work / "model", base=base)
    prompts = [query.caption or "" for query in trained[1::2] + trained[::2]] if conditional else None
    queries = [
        *generated(work, recipe, base, prompts),
        *trained,
        *chosen(work / "unseen", "unseen", conditional),
    ]
    truth = retraining.create(
        work / "truth", base=base, dataset=work / "dataset", recipe=recipe, queries=queries, draws=40
    )
    kept, journal = PAPER / "truth" / name, truth.folder / "runs.jsonl"
    facts = truth.folder / "truth.json"
    same = (kept / "truth.json").exists() and (kept / "truth.json").read_bytes() == facts.read_bytes()
    if same and not journal.exists():
        shutil.copy(kept / "runs.jsonl", journal)  # the losses that were measured for the paper, of these pictures
    return truth


def planned(truth: Truth) -> list[Run]:
    """Halves and coalitions."""
    n = len(truth.items)
    masks = retraining.halves(0, HALVES, n)
    runs = [Run(f"half-{i:03d}", mask, seed) for i, mask in enumerate(masks) for seed in range(HALF_SEEDS)]
    for owners, mask in retraining.coalitions([item.creator for item in truth.items]).items():
        runs += [Run(evaluation.coalition_name(owners), mask, seed) for seed in range(COALITION_SEEDS)]
    return runs


def verify(truth: Truth, name: str, count: int) -> None:
    """Retrain some of the models that the paper's folder lists, and compare the losses of the same queries.

    Raises:
        SystemExit: The images are others, or a loss differs by more than 1 %.
    """
    kept = PAPER / "truth" / name
    there, here = (json.loads((folder / "truth.json").read_text(encoding="utf-8")) for folder in (kept, truth.folder))
    if there["items"] != here["items"] or there["recipe"] != here["recipe"] or there["base"] != here["base"]:
        raise SystemExit(f"{kept} is of other images, another recipe or base than {truth.folder}")
    same = np.array([a == b for a, b in zip(there["queries"], here["queries"], strict=True)])
    listed = replace(truth, folder=kept).runs()
    maker = retraining.Retrainer(truth)
    worst = 0.0
    for i in np.linspace(0, len(listed) - 1, count).round().astype(int):
        row = listed.iloc[i]
        maker.retrain(Run(row["name"], row["members"], row["seed"]))
        difference = float(np.abs(maker.measure()[same] / row["loss"][same] - 1).max())
        worst = max(worst, difference)
        print(
            f"{row['name']}, seed {row['seed']}: largest difference of a loss {difference:.1e} (relative)", flush=True
        )
    print(f"{count} of {len(listed)} models retrained, {same.sum()} of {len(same)} queries are the same")
    if worst > 0.01:
        raise SystemExit(f"a loss differs by {worst:.1%}; expected at most 1 %")


def main() -> None:
    """Make or verify."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("truth", choices=RECIPES)
    parser.add_argument("--work", type=Path, required=True, help="folder for pictures, models and losses")
    parser.add_argument("--pictures", type=Path, help="what data/emoji.py --size 16 --count 116 made")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--limit", type=int, help="only the first runs of the plan")
    parser.add_argument("--verify", type=int, metavar="N", help="retrain N of the models that were kept, and compare")
    options = parser.parse_args()
    torch.set_num_threads(1)
    truth = prepare(options.truth, options.work, options.pictures)
    if options.verify:
        verify(truth, options.truth, options.verify)
        return
    retraining.retrain(
        truth,
        planned(truth)[: options.limit],
        workers=options.workers,
        progress=lambda stage, done, total: print(f"{stage} {done}/{total}", file=sys.stderr, flush=True),
    )


if __name__ == "__main__":
    main()
