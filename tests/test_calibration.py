"""Numbers of a device from times: made from known numbers, they must come back; and what the search does with their errors."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from gqa_jax import costs
from gqa_jax.hardware import CHIPS, Chip, Efficiency
from gqa_jax.laws import Heads
from gqa_jax.search import calibration, device_file, objectives, optimum, presets, serving_words
from gqa_jax.search.answer import Model
from gqa_jax.search.calibration import Timing
from gqa_jax.search.roofline import RooflineServing

DEEP = costs.Shape(16, 512, 8, 8, 64, 1376, 2048)
WIDE = costs.Shape(4, 1024, 8, 1, 64, 2720, 2048)
UNSEEN = costs.Shape(8, 768, 32, 8, 64, 2048, 2048)
ABOUT = {"name": "here", "device_kind": "a processor", "memory_bytes": 16e9, "param_dtype": "float32", "cache_dtype": "float32"}
CPU = Chip("here", 80e9, 16e9, 12e9, interconnect=0.0)
TRUE = Efficiency(1.0, 0.5, 1.0, 0.6, 1e-3)  # of it


def timings(serving, shapes=(DEEP, WIDE), contexts=(256, 1024, 4096), batches=(1, 2, 8), noise=0.0, seed=0):
    rng, found = np.random.default_rng(seed), []
    for shape in shapes:
        for context in contexts:
            for batch in batches:
                for kind, passes in (("prefill", -(-context // 2048)), ("decode", 1)):
                    one = Timing(kind, shape, context, batch, passes, 1.0)
                    seconds = float(calibration.phase(serving, one).seconds) * np.exp(noise * rng.normal())
                    found.append(one._replace(seconds=seconds))
    return found


def here(efficiency=TRUE, chip=CPU):
    return RooflineServing(chip, param_dtype="float32", cache_dtype="float32", efficiency=efficiency)


def fit(times, chip=None, **more):
    return calibration.fit(times, chip, source="measured", **ABOUT | more)


def rates(efficiency, chip):
    peaks = np.array([chip.peak_flops, chip.peak_flops, chip.memory_bandwidth, chip.memory_bandwidth, 1.0])
    return peaks * np.array(efficiency[:5])


@pytest.mark.parametrize("overlap", [1.0, 2.0])
def test_times_without_noise_give_the_numbers_back(overlap):
    found = fit(timings(here(TRUE._replace(overlap=overlap))))
    np.testing.assert_allclose(rates(found.device.efficiency, found.device.chip), rates(TRUE, CPU), rtol=1e-4)
    assert found.device.efficiency.overlap == overlap
    assert not any(number.bound for number in found.numbers)
    np.testing.assert_allclose(found.left_out_T, 1, rtol=1e-4)


def test_a_data_sheet_gives_shares_of_its_peaks():
    chip, true = CHIPS["h100"], Efficiency(0.6, 0.8, 0.7, 0.9, 30e-6)
    serving = RooflineServing(chip, efficiency=true)
    shapes = costs.Shape(8, 2048, 8, 1), costs.Shape(32, 1024, 16, 16)
    times = timings(serving, shapes, (2048, 16_384, 65_536))
    found = fit(times, chip, param_dtype="bfloat16", cache_dtype="bfloat16")
    np.testing.assert_allclose(found.device.efficiency[:5], true[:5], rtol=1e-3)
    # above a peak nothing is taken: the times are explained by what is left
    faster = fit([one._replace(seconds=one.seconds / 3) for one in times], chip, param_dtype="bfloat16", cache_dtype="bfloat16")
    assert max(faster.device.efficiency[:4]) <= 1


def test_standard_errors_say_how_far_off_numbers_are():
    """3% of noise, 20 times: nine in ten numbers within two standard errors, and these no wider than they must be."""
    off, wide = [], []
    for seed in range(20):
        found = fit(timings(here(), noise=0.03, seed=seed))
        assert not any(number.bound for number in found.numbers)
        error = np.array(found.device.efficiency.errors)
        own = rates(TRUE, CPU) / rates(found.device.efficiency, found.device.chip)
        own[4] = 1 / own[4]
        off.append(np.abs(own - 1) / error)
        wide.append(error)
    assert (np.array(off) < 2).mean() > 0.85
    assert np.median(wide, axis=0).max() < 0.15


def test_runs_that_were_not_seen_are_foretold():
    """As far off as a simulation of the design says at 3% noise, 1.3% in the median, 4.2% at the 95th percentile; in order."""
    found = fit(timings(here(), noise=0.03, seed=1)).device
    serving = RooflineServing(found.chip, param_dtype="float32", cache_dtype="float32", efficiency=found.efficiency)
    unseen = timings(here(), (UNSEEN, dataclasses.replace(UNSEEN, n_heads=8, n_kv_heads=1)), (512, 2048, 8192), (1, 4))
    ratio = np.array([float(calibration.phase(serving, one).seconds) / one.seconds for one in unseen])
    assert np.percentile(abs(ratio - 1), 50) < 0.02
    assert np.percentile(abs(ratio - 1), 95) < 0.06
    half = len(unseen) // 2
    for i in range(half):
        if abs(np.log(unseen[i].seconds / unseen[half + i].seconds)) > np.log(1.15):
            true = unseen[i].seconds < unseen[half + i].seconds
            assert (ratio[i] * unseen[i].seconds < ratio[half + i] * unseen[half + i].seconds) == true


def test_what_the_runs_do_not_fix_is_a_bound():
    """Prompts alone, long ones: nothing reads parameters or caches for as long as a twentieth of the time."""
    times = [one for one in timings(here(), noise=0.02, batches=(4, 8)) if one.kind == "prefill"]
    found = fit(times)
    number = {one.name: one for one in found.numbers}
    assert number["weights_bandwidth"].bound
    assert number["cache_bandwidth"].bound
    assert not number["matmul"].bound
    assert number["weights_bandwidth"].value < 12e9 * 1.2  # the least rate: not above the true one by more than the noise
    assert number["weights_bandwidth"].error > calibration.MOST
    words, value = calibration.unit(number["weights_bandwidth"])
    assert words == "Gbytes/s of parameters"
    assert value == number["weights_bandwidth"].value / 1e9
    assert np.isfinite(found.device.efficiency[:5]).all()


def test_one_bad_time_moves_little():
    """A shared machine: one of 36 takes three times as long."""
    times = timings(here(), noise=0.02)
    times[3] = times[3]._replace(seconds=3 * times[3].seconds)
    found = fit(times)
    np.testing.assert_allclose(rates(found.device.efficiency, found.device.chip), rates(TRUE, CPU), rtol=0.2)


@pytest.mark.parametrize(("times", "message"), [(timings(here())[:11], "11 times: a fit takes 12"),
    ([one._replace(seconds=0.0) for one in timings(here())], "seconds above 0")])  # fmt: skip
def test_times_that_are_none_are_refused(times, message):
    with pytest.raises(ValueError, match=message):
        fit(times)


@pytest.fixture(scope="module")
def device():
    return fit(timings(here(), noise=0.03, seed=2)).device


@pytest.fixture
def path(device, tmp_path):
    file = tmp_path / "here.json"
    file.write_text(json.dumps(device.to_dict()))
    return str(file)


def test_a_device_is_read_as_it_was_written(device, path):
    assert device_file.read(path) == device
    serving = RooflineServing(path)
    assert serving.chip == device.chip
    assert serving.efficiency == device.efficiency
    assert (serving.param_dtype, serving.cache_dtype) == ("float32", "float32")  # as it was measured
    assert RooflineServing(path, cache_dtype="int8").cache_dtype == "int8"
    assert RooflineServing(path, efficiency=0.5).efficiency == Efficiency.uniform(0.5)
    assert device_file.read_efficiency(path) == device.efficiency  # of a device that is named otherwise
    assert serving.describe()["efficiency"]["errors"] == device.efficiency.errors


def test_a_device_of_a_data_sheet_has_its_prices(device, tmp_path):
    file = tmp_path / "h100.json"
    file.write_text(json.dumps(device.to_dict() | {"name": "our h100", "chip": "h100"}))
    found = RooflineServing(str(file))
    assert found.chip.name == "our h100"
    assert found.chip.peak_flops == CHIPS["h100"].peak_flops
    assert found.usd == CHIPS["h100"].price.usd_per_hour


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chip": "h1000"}, "chip = 'h1000': must be null or one of v4"),
        ({"peak_flops": None}, "peak_flops = None: must be a number above 0"),
        ({"memory_bytes": -1}, "memory_bytes = -1"),
        ({"param_dtype": "float3"}, "float3"),
        ({"efficiency": {"matmul": 1}}, 'must have {"efficiency": {matmul'),
        ({"errors": [0.1, 0.2]}, "five relative standard errors"),
        ({"errors": [0.1] * 4 + [float("nan")]}, "five relative standard errors"),
        ({"correlation": []}, "five rows of five"),
    ],
)
def test_a_file_that_is_none_says_which_field(device, tmp_path, change, message):
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(device.to_dict() | change))
    with pytest.raises(ValueError, match=re.escape(f"device {file}: ") + ".*" + re.escape(message)):
        RooflineServing(str(file))


def test_devices_that_are_no_files(tmp_path, path):
    with pytest.raises(ValueError, match="device 'h20' is unknown: did you mean 'h200'"):
        RooflineServing("h20")
    with pytest.raises(ValueError, match=r"none\.json: .*No such file"):
        RooflineServing(str(tmp_path / "none.json"))
    with pytest.raises(ValueError, match="nobody publishes peaks"):
        RooflineServing(path, efficiency="bound")
    with pytest.raises(ValueError, match="give usd_per_hour"):
        objectives.make("price", device=path)
    with pytest.raises(ValueError, match="training_mfu: nothing is known of training on here"):
        objectives.make("lifetime", device=path, served_tokens=1e12, usd_per_hour=1.0)
    with pytest.raises(ValueError, match="has no link"):
        RooflineServing(path, n_devices=2)


def test_an_overlap_lies_between_the_sum_and_the_longest(path):
    times = {}
    for overlap in (1.0, 2.0, 100.0):
        serving = here(TRUE._replace(overlap=overlap))
        part = serving.decode_step(WIDE, 4096, batch=8)
        times[overlap] = part.seconds
    longest = max(part.matmul, part.weights) + max(part.attention, part.cache) + part.layers
    assert times[100.0] == pytest.approx(longest, rel=0.01)
    assert times[100.0] < times[2.0] < times[1.0]
    assert here(TRUE._replace(overlap=2.0)).decode_step(WIDE, np.array([1.0, np.nan]), batch=1).seconds[0] > 0


class TestUncertainty:
    LAWS = presets.load("paper-table4")
    HEADS = (Heads(8, 1), Heads(32, 8))

    def probabilities(self, file, tmp_path, errors, cost="latency", **more):
        content = json.loads(Path(file).read_text()) | {"errors": errors, "correlation": np.eye(5).tolist()}
        other = tmp_path / "other.json"
        other.write_text(json.dumps(content | {"memory_bytes": 1e15}))
        goal = objectives.make(cost, device=str(other), **more)
        found = optimum.search(self.LAWS, 2.615, 131_072, goal, heads=self.HEADS, draws=400)
        return found.candidates.set_index(["n_heads", "n_kv_heads"])[["probability", "cost_low", "cost_high", "cost"]]

    def test_errors_of_a_device_widen_costs(self, path, tmp_path):
        exact, loose = (self.probabilities(path, tmp_path, [error] * 5) for error in (0.0, 0.4))
        for heads in self.HEADS:
            spread = [found.loc[heads, "cost_high"] / found.loc[heads, "cost_low"] for found in (exact, loose)]
            assert spread[1] > 1.2 * spread[0]
            assert loose.loc[heads, "cost"] == exact.loc[heads, "cost"]

    def test_draws_of_a_device_are_those_of_all_heads(self, path, tmp_path):
        """Only one part takes time: whatever its rate, heads are in one order."""
        content = json.loads(Path(path).read_text())
        slow = content["efficiency"] | {"matmul": 1.0, "attention": 1.0, "weights_bandwidth": 1.0, "layer_seconds": 0.0}
        only_cache = tmp_path / "cache.json"
        only_cache.write_text(json.dumps(content | {"efficiency": slow | {"cache_bandwidth": 1e-9}}))
        known, unsure = (self.probabilities(only_cache, tmp_path, [0, 0, 0, error, 0]) for error in (0.0, 0.5))
        assert known["probability"].tolist() == pytest.approx(unsure["probability"].tolist(), abs=0.01)

    def test_draws_are_the_seed_s(self, path):
        serving = RooflineServing(path)
        first, again, other = (serving.drawn(50, seed).efficiency for seed in (0, 0, 1))
        assert first.matmul.shape == (50, 1)
        np.testing.assert_array_equal(first.matmul, again.matmul)
        assert (first.matmul != other.matmul).any()
        seconds = 1 / first.matmul[:, 0] * serving.efficiency.matmul
        assert seconds.std() == pytest.approx(serving.efficiency.errors[0], rel=0.5)
        assert here().drawn(5, 0).efficiency == TRUE  # nothing is known of its errors

    def test_a_model_of_one_s_own_is_drawn_on_the_same_device(self, path, tmp_path):
        """Only one part takes time: whatever its rate, savings against a model are what they were."""
        content = json.loads(Path(path).read_text()) | {"memory_bytes": 1e15, "correlation": np.eye(5).tolist()}
        slow = {"matmul": 1.0, "attention": 1.0, "weights_bandwidth": 1.0, "cache_bandwidth": 1e-9, "layer_seconds": 0.0}
        found = []
        for error in (0.0, 0.4):
            file = tmp_path / f"{error}.json"
            file.write_text(json.dumps(content | {"efficiency": slow, "errors": [0, 0, 0, error, 0]}))
            model = Model("mine", Heads(8, 1), costs.Shape(24, 1536, 8, 1), loss=2.615, n_params=1e9)
            goal, how = objectives.make("latency", device=str(file)), {"heads": self.HEADS, "draws": 200}
            answer = optimum.search(self.LAWS, 2.615, 131_072, goal, baseline=model, **how)
            found.append(answer.saving_interval)
        assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_an_answer_says_what_was_measured(path):
    goal = objectives.make("latency", device=path, efficiency=None)
    answer = optimum.search(TestUncertainty.LAWS, 2.9, 8192, goal, heads=TestUncertainty.HEADS, draws=100)
    said = "\n".join(serving_words.said(answer))
    assert re.search(
        r"reached: [78]\d(\.\d)? GFLOP/s in products with parameters, .* GB/s of parameters and .* of caches", said
    )
    assert "of the peaks" not in said
    assert "(standard errors), drawn with the laws'" in said
    assert answer.objective["serving"]["efficiency"]["source"] in "\n".join(serving_words.assumed(answer))
