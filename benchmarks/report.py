"""How long a report takes to make, how large it is, and how long its explorer takes to answer in a real browser.

    python -m benchmarks.report [--browser]

Of the two presets, with all that `python -m launch report` computes: seconds of processor time, and megabytes. Then the page
of known laws, 168 cells: 8 sizes of the paper's 21 head configurations, and Llama-3's. Chromium draws without a screen and
without a GPU. An update is from the event of a slider to the end of the frame in which its answer is drawn. With --browser
that alone.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from gqa_jax.search import objectives
from launch import findings, report, studies
from tests import browser, report_fakes

PRESETS = ("paper", "paper-table4")
UPDATES = 300

DRAG = """
  const [count] = arguments;
  while (!globalThis.gqa) await new Promise((resolve) => setTimeout(resolve, 20));
  document.getElementById("explorer").scrollIntoView({ behavior: "instant" });
  const slider = (name) => document.getElementById(`${name}-slider`);
  const times = { look: [], event: [], update: [] };
  for (let i = 0; i < count; i++) {
    await new Promise((resolve) => setTimeout(resolve, 40));
    const input = slider(["context", "loss"][i % 2]);
    const [low, high] = [Number(input.min), Number(input.max)];
    input.value = String(low + (high - low) * (0.15 + 0.7 * ((i * 0.381966) % 1)));
    const start = performance.now();
    input.dispatchEvent(new Event("input", { bubbles: true }));
    times.event.push(performance.now() - start);
    await new Promise((resolve) => requestAnimationFrame(() => setTimeout(resolve)));
    times.update.push(performance.now() - start);
    const before = performance.now();
    gqa.look(gqa.studies[0].map, gqa.query());
    times.look.push(performance.now() - before);
  }
  return times;
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--browser", action="store_true", help="only how long an update takes")
    for preset in () if parser.parse_args().browser else PRESETS:
        measure(preset)
    drag()


def measure(preset: str) -> None:
    """Makes the report of a preset, with its three devices."""
    wall, start = time.perf_counter(), time.process_time()
    found = findings.of(studies.of_preset(preset), objectives.Z())
    found_at = time.process_time()
    html = report.page(found)
    (study,) = found.studies
    cells = len(study.answer_map.rows) // study.answer_map.rows.groupby(["n_heads", "n_kv_heads"], dropna=False).ngroups
    spent, wall = time.process_time() - start, time.perf_counter() - wall
    print(
        f"{preset}: {spent:.1f} s of a processor ({wall:.1f} s), of these {time.process_time() - found_at:.1f} s for the page; "
        f"{cells:,} questions in its map; {len(html.encode()) / 1e6:.2f} MB"
    )


def drag() -> None:
    """Drags the sliders of a page."""
    table = report_fakes.loss_table(report_fakes.GRID)
    study = report_fakes.study(table)
    html = report.page(report_fakes.findings(study, table=table, about=f"{len(table)} runs of 8 sizes and 21 configurations"))
    with tempfile.TemporaryDirectory() as folder, browser.running() as chromium:
        path = Path(folder) / "index.html"
        path.write_text(html, encoding="utf-8")
        chromium.open(path)
        times = chromium.run(DRAG, UPDATES)
        print(f"{UPDATES} updates; milliseconds, median and 95th percentile:")
        for name, values in times.items():
            print(f"  {name:8} {np.median(values):6.1f} {np.percentile(values, 95):6.1f}")
        assert not (said := chromium.console()), said


if __name__ == "__main__":
    main()
