"""What the documentation's tables say beyond one comparison. From the repository's root:

python results/tables.py merge results/FILE.csv SUMMARY.csv...  rows of comparisons into a file: newer in place of old,
                                                                or added to them where the seeds are others
python results/tables.py difference FILE:CONV FILE:CONV          the paired difference of two results, 95 % interval
python results/tables.py rates TASK                              results/TASK-rates.csv: each convolution's rates
"""

import csv
import statistics
import sys
from pathlib import Path

from timm_metricconv.recipes.intervals import paired_difference
from timm_metricconv.recipes.report import csv_text, write_atomic

RATES = ("0.03", "0.1", "0.3", "1.0", "3.0")
CELL = ("conv", "init", "kernel")
SCORES = {"top1", "top5", "dice", "iou"}
ORDER = ("standard", "shifted", "deform", "deform-bounded", "metric", "metric-rays")  # others follow as they come


def read(path):
    with Path(path).open(newline="") as file:
        return {tuple(row[key] for key in CELL): row for row in csv.DictReader(file)}


def by_seed(row):
    score = row["dice"] if "dice" in row else row["top1"]
    return dict(zip(row["seeds"].split(), map(float, score.split()), strict=True))


def difference(ours, theirs):
    """Over the seeds that both have."""
    ours, theirs = by_seed(ours), by_seed(theirs)
    seeds = [seed for seed in ours if seed in theirs]
    return paired_difference([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])


def joined(old, new):
    """The row of both, if no seed is in both, or else the newer one."""
    if set(old["seeds"].split()) & set(new["seeds"].split()):
        return new
    row = new | {"seeds": f"{old['seeds']} {new['seeds']}"}
    for score in SCORES & new.keys():
        row[score] = f"{old[score]} {new[score]}"
        values = [float(value) for value in row[score].split()]
        row |= {f"{score}_mean": statistics.mean(values), f"{score}_std": statistics.stdev(values)}
    return row


def merge(target, *summaries):
    """Each row's differences to the rows `standard` and `metric` of the same start and kernels are made anew."""
    rows = read(target) if Path(target).exists() else {}
    for summary in summaries:
        rows |= {cell: joined(rows[cell], row) if cell in rows else row for cell, row in read(summary).items()}
    for (conv, *rest), row in rows.items():
        row.pop("vs_standard", None)  # of a comparison without the standard convolution
        for base in ("standard", "metric"):
            other = rows.get((base, *rest))
            found = difference(row, other) if other and conv != base else None
            row |= {f"vs_{base}.{key}": found and getattr(found, key) for key in ("difference", "low", "high")}
    starts = list(dict.fromkeys((row["init"], row["kernel"]) for row in rows.values()))
    place = {conv: number for number, conv in enumerate(ORDER)}
    ordered = sorted(
        rows.values(), key=lambda r: (starts.index((r["init"], r["kernel"])), place.get(r["conv"], len(place)))
    )
    write_atomic(target, csv_text(ordered))


def named(text):
    file, _, conv = text.partition(":")
    conv, *rest = conv.split("/")
    return read(Path("results") / file)[(conv, *(rest or ("scratch", "learnable")))]


def rates(task):
    """For each convolution mean and spread at each rate, and what it loses there against its best one."""
    files = {
        rate: read(f"results/{task}-rate-{rate}.csv")
        for rate in RATES
        if Path(f"results/{task}-rate-{rate}.csv").exists()
    }
    table = []
    for conv in dict.fromkeys(cell[0] for file in files.values() for cell in file):
        rows = {
            rate: file[conv, "scratch", "learnable"]
            for rate, file in files.items()
            if (conv, "scratch", "learnable") in file
        }
        if len(rows) == 1:
            continue
        best = max(rows, key=lambda rate: statistics.mean(by_seed(rows[rate]).values()))
        entry = {"conv": conv, "best": best}
        for rate in files:
            row = rows.get(rate)
            entry |= {f"{rate}.{key}": row and row[f"top1_{key}"] for key in ("mean", "std")}
            loss = difference(rows[best], row) if row and rate != best else None
            entry |= {
                f"{rate}.{key}": loss and getattr(loss, name)
                for key, name in (("loss", "difference"), ("low", "low"), ("high", "high"))
            }
        table.append(entry)
    write_atomic(f"results/{task}-rates.csv", csv_text(table))


if __name__ == "__main__":
    command, *arguments = sys.argv[1:]
    if command == "difference":
        print(difference(*map(named, arguments)))
    else:
        {"merge": merge, "rates": rates}[command](*arguments)
