"""Runs killed by the hundred and files damaged by the thousand, for which the suite has no time.

    make soak ARGS="--kills 20 --damages 200 --seed 1"

Each case is one row of FOLDER/seedN.csv as soon as it has ended; the same command continues there. A killed
run must end as the unbroken one does. A damaged file must give the result of the whole one, or one line that
names the file. `--only damage:17` repeats one case."""

import argparse
import csv
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from datetime import date
from multiprocessing.connection import wait
from pathlib import Path

import pandas as pd
from conftest import ENVIRONMENT, FORKS
from tqdm import tqdm

from aligned_mllm.core import environment, save_json

COLUMNS = ("part", "number", "kind", "where", "how", "kills", "outcome", "seconds", "message")
GOOD = ("equal", "same", "refused", "cannot be known")


def rows_in(path: Path) -> list[dict]:
    "The cases that have ended; a line that was cut off by Ctrl-C does not count."
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as handle:
        return [row for row in csv.DictReader(handle) if row["message"] is not None]


def damage_worker(pipe, folder: Path, seed: int, numbers: list[int]) -> None:
    "Cases of damage: the number of each when it begins, and its row when it has ended."
    import soak_damage

    soak_damage.quiet()
    with tempfile.TemporaryDirectory(dir=folder) as below:
        places = soak_damage.places_in(Path(below))
        for number in numbers:
            pipe.send(number)
            begin = time.perf_counter()
            found = soak_damage.case(places, seed, number)
            pipe.send({**found, "number": number, "seconds": time.perf_counter() - begin})


def damages(folder: Path, seed: int, numbers: list[int], workers: int) -> Iterator[dict]:
    "Rows of the cases of damage, from several processes. One that dies is a case of its own."
    left = {worker: numbers[worker::workers] for worker in range(workers)}
    pipes = {}
    begun = {}
    while left or pipes:
        for worker in [worker for worker in left if worker not in pipes.values()]:
            here, there = FORKS.Pipe(duplex=False)
            work = (there, folder, seed, left.pop(worker))
            FORKS.Process(target=damage_worker, args=work, daemon=True).start()
            there.close()
            pipes[here] = worker
            begun[worker] = [None, list(work[-1])]
        for pipe in wait(list(pipes)):
            worker = pipes[pipe]
            try:
                found = pipe.recv()
            except EOFError:
                del pipes[pipe]
                number, rest = begun[worker]
                if number is not None:
                    yield {"number": number, "kind": "", "outcome": "DIED", "message": "the process died"}
                    rest.remove(number)
                if rest and number is not None:
                    left[worker] = rest
                continue
            if isinstance(found, int):
                begun[worker][0] = found
                continue
            begun[worker][0] = None
            begun[worker][1].remove(found["number"])
            yield found


def kills(folder: Path, seed: int, numbers: list[int], workers: int) -> Iterator[dict]:
    "Rows of the cases of killed runs."
    import soak_kills

    every = soak_kills.cells(seed)
    for at in tqdm(sorted({number % len(every) for number in numbers}), desc="unbroken runs"):
        soak_kills.reference(folder, every[at], at)

    def one(number: int) -> dict:
        begin = time.perf_counter()
        found = soak_kills.case(folder, seed, number)
        return {**found, "number": number, "seconds": time.perf_counter() - begin}

    pool = ThreadPoolExecutor(workers)
    try:
        yield from (each.result() for each in as_completed([pool.submit(one, number) for number in numbers]))
    finally:  # Ctrl-C does not wait for cases that have not begun
        pool.shutdown(cancel_futures=True)


def carried_out(part: str, rows: Iterator[dict], count: int, table: Path) -> None:
    "Append each row to the table, and say at once what has failed."
    new = not table.is_file()
    with open(table, "a", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, COLUMNS, restval="", extrasaction="ignore")
        if new:
            writer.writeheader()
        for row in tqdm(rows, desc=f"{part}s", total=count, smoothing=0):
            message = " ".join(str(row["message"]).split())
            writer.writerow({**row, "part": part, "message": message, "seconds": f"{row['seconds']:.2f}"})
            handle.flush()
            if row["outcome"] not in GOOD:
                tqdm.write(f"{part}:{row['number']} {row['outcome']} {row.get('where', '')} {message[:500]}")


def tables_of(rows: list[dict]) -> dict[str, pd.DataFrame]:
    "Counts by kind and outcome, for each part."
    found = {}
    table = pd.DataFrame(rows)
    for part, key in (("kill", "how"), ("damage", "kind")):
        cases = table[table.part == part]
        if len(cases):
            counts = pd.crosstab(cases[key], cases.outcome)
            counts.insert(0, "cases", cases.groupby(key).size())
            if part == "kill":
                counts.insert(1, "killed starts", cases.kills.astype(int).groupby(cases[key]).sum())
            counts.loc["all"] = counts.sum()
            found[f"{part}s"] = counts
    return found


def options_of(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="how many runs are killed")
    parser.add_argument("--damages", type=int, default=5000, help="how many files are damaged")
    parser.add_argument("--seed", type=int, default=1, help="decides all cases")
    parser.add_argument("--workers", type=int, default=2, help="cases at a time")
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"), help="of tables and files")
    parser.add_argument("--only", default="", metavar="PART:NUMBER", help="one case, such as kill:17")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    options = options_of(words)
    options.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=options.folder)) if options.only else options.folder
    table = folder / f"seed{options.seed}.csv"
    asked = {"damage": range(options.damages), "kill": range(options.kills)}
    if options.only:
        part, number = options.only.split(":")
        asked = {part: [int(number)]}
    for part, work in (("damage", damages), ("kill", kills)):
        done = {int(row["number"]) for row in rows_in(table) if row["part"] == part}
        numbers = [number for number in asked.get(part, ()) if number not in done]
        if numbers:
            below = folder / f"{part}s{options.seed}"
            below.mkdir(exist_ok=True)
            carried_out(part, work(below, options.seed, numbers, options.workers), len(numbers), table)
    rows = [row for row in rows_in(table) if int(row["number"]) in asked.get(row["part"], ())]
    for part, counts in tables_of(rows).items():
        print(f"\n{counts.to_string()}")
        counts.to_csv(folder / f"{part}.csv")
        own = [row for row in rows if f"{row['part']}s" == part]
        save_json(facts_of(options, own), folder / f"{part}.json")
    bad = [row for row in rows if row["outcome"] not in GOOD]
    for row in bad:
        case = f"--seed {options.seed} --only {row['part']}:{row['number']}"
        print(f"{case}: {row['outcome']} {row['message'][:200]}")
    return int(bool(bad))


def facts_of(options: argparse.Namespace, rows: list[dict]) -> dict:
    "How the table of one part was made."
    words = f"--kills {options.kills} --damages {options.damages} --seed {options.seed}"
    return {
        "command": f'make soak ARGS="{words}"',
        "seed": options.seed,
        "cases": len(rows),
        "failures": sum(row["outcome"] not in GOOD for row in rows),
        "seconds": round(sum(float(row["seconds"] or 0) for row in rows)),
        "date": str(date.today()),
        **environment(),
    }


if __name__ == "__main__":
    os.environ |= ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # of the forks
    FORKS.set_forkserver_preload(["soak_kills", "soak_damage"])
    sys.exit(main())
