"""The explorer's functions in node, without a page: what they say to questions, in a second."""

from __future__ import annotations

import json
import shutil
import subprocess
from importlib import resources
from pathlib import Path
from typing import Any

from launch.report import Study, answer_map

_PROGRAM = """
import fs from "node:fs";
import * as explorer from "./explorer.mjs";
import * as numbers from "./numbers.mjs";
const [maps, script, given] = JSON.parse(fs.readFileSync(0, "utf8"));
const studies = await Promise.all(maps.map(async (map) => ({ map: await explorer.unpack(map) })));
const gqa = { ...explorer, ...numbers, studies };
const answer = await new Function("gqa", "given", `return (async () => { ${script} })();`)(gqa, given);
const plain = (key, value) => (typeof value === "number" && !Number.isFinite(value) ? String(value) : value);
process.stdout.write(JSON.stringify(answer === undefined ? null : answer, plain));
"""


def is_there() -> bool:
    """Whether this machine has a node with what browsers have to unpack a map (18 and later)."""
    if shutil.which("node") is None:
        return False
    asked = ["node", "-e", "process.exit(typeof DecompressionStream === 'function' ? 0 : 1)"]
    return subprocess.run(asked, check=False).returncode == 0


def run(folder: Path, studies: list[Study], script: str, given: Any = None) -> Any:
    """What the body of a JavaScript function of `gqa` and `given` returns; numbers that JSON does not have come as text."""
    for name in ("explorer", "numbers"):
        (folder / f"{name}.mjs").write_text((resources.files("launch.report") / f"{name}.js").read_text())
    (folder / "program.mjs").write_text(_PROGRAM)
    maps = [answer_map.packed(one.answer_map, one.laws) for one in studies]
    asked = json.dumps([maps, script, given])
    done = subprocess.run(["node", "program.mjs"], cwd=folder, input=asked, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
