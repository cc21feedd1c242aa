"""How long a report takes to make, how large it is, and how long its explorer takes to answer in a real browser.

    python -m benchmarks.report

Made from known laws: 168 cells, 8 sizes of the paper's 21 head configurations, and Llama-3's by the head law. Chromium
draws without a screen and without a GPU. An update is from the event of a slider to the end of the last chart's drawing.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np

from launch import report
from tests import browser, report_fakes

UPDATES = 300

DRAG = """
  const [count] = arguments;
  while (!globalThis.gqa) await new Promise((resolve) => setTimeout(resolve, 20));
  document.getElementById("explorer").scrollIntoView({ behavior: "instant" });
  const views = Object.values(gqa.charts).map((chart) => chart.view);
  const painted = new Map();
  for (const view of views) {
    const repaint = view.repaint.bind(view);
    view.repaint = (...given) => { repaint(...given); painted.set(view, performance.now()); };
  }
  const slider = (name) => document.getElementById(`${name}-slider`);
  const times = { search: [], event: [], update: [] };
  for (let i = 0; i < count; i++) {
    await new Promise((resolve) => setTimeout(resolve, 40));
    const input = slider(["context", "loss", "lam"][i % 3]);
    const [low, high] = [Number(input.min), Number(input.max)];
    input.value = String(low + (high - low) * (0.15 + 0.7 * ((i * 0.381966) % 1)));
    painted.clear();
    const start = performance.now();
    input.dispatchEvent(new Event("input", { bubbles: true }));
    times.event.push(performance.now() - start);
    for (let frame = 0; frame < 5; frame++) await new Promise((resolve) => requestAnimationFrame(resolve));
    times.update.push(Math.max(start + times.event.at(-1), ...painted.values()) - start); // what does not change is not drawn
    const before = performance.now();
    gqa.search(gqa.studies[0], gqa.query());
    times.search.push(performance.now() - before);
  }
  return { ...times, charts: views.length };
"""


def main() -> None:
    table = report_fakes.loss_table(report_fakes.GRID)
    study = report_fakes.study(table)
    findings = report_fakes.findings(study, table=table, about=f"{len(table)} runs of 8 sizes and 21 head configurations")
    start = time.perf_counter()
    html = report.page(findings)
    print(f"page of {len(table)} cells: {time.perf_counter() - start:.1f} s, {len(html.encode()) / 1e6:.2f} MB")
    with tempfile.TemporaryDirectory() as folder, browser.running() as chromium:
        path = Path(folder) / "index.html"
        path.write_text(html, encoding="utf-8")
        chromium.open(path)
        times = chromium.run(DRAG, UPDATES)
        print(f"{UPDATES} updates of {times.pop('charts')} charts; milliseconds, median and 95th percentile:")
        for name, values in times.items():
            print(f"  {name:8} {np.median(values):6.1f} {np.percentile(values, 95):6.1f}")
        assert not (said := chromium.console()), said


if __name__ == "__main__":
    main()
