"""What each idea of the final network is worth, over five patient folds of real ECGs.

    python tests/tools/ablation.py --real PATH --work FOLDER [--variants final no_normalisation ...]
                                   [--folds 0 1 2 3 4] [--seeds 42 43 44] [--disturbed]

PATH: a codesubset/ folder or an archive of one; only its training exams are used. Networks, `train_model` and
the training recipes are read from the notebook, so an edit there is measured here. Each variant is trained on
four fifths of the patients and scored on the fifth; AP and F1 are reweighted to 50 % prevalence. F1 is at the
threshold that the *other* folds' out-of-fold logits (of the same seed) give, so no exam takes part in the choice
of its own operating point. The last column compares fold by fold and seed by seed with the final network, where
both were trained. Finished runs are kept in FOLDER and loaded as long as code and settings are the same, so the
table can be completed in several sittings.

--disturbed adds a second table: the finished variants on the same held-out exams with artefacts as other
recorders and restless patients would give them, at the operating point of the undisturbed exams.
"""

import argparse
import json
import time
from functools import partial
from itertools import product
from pathlib import Path

import h5py
import notebook_source
import numpy as np
import pandas as pd
import torch
from scipy import signal as dsp
from sklearn.model_selection import StratifiedGroupKFold
from torch import nn

import ecg_helpers as ecg

SEED = 42  # where no other is asked for


# ---- Networks that only the study has ------------------------------------------------------------
class RibeiroBlock(nn.Module):
    """Residual block of Ribeiro et al. 2020: two convolutions, the second strided; max-pooled skip
    connection.
    """

    def __init__(self, c_in, c_out, stride, kernel_size=17, dropout=0.2):
        super().__init__()
        conv = partial(nn.Conv1d, kernel_size=kernel_size, padding=kernel_size // 2, bias=False)
        self.first = nn.Sequential(conv(c_in, c_out), nn.BatchNorm1d(c_out), nn.ReLU(), nn.Dropout(dropout))
        self.second = conv(c_out, c_out, stride=stride)
        self.skip = nn.Sequential(nn.MaxPool1d(stride), nn.Conv1d(c_in, c_out, 1, bias=False))
        self.out = nn.Sequential(nn.BatchNorm1d(c_out), nn.ReLU(), nn.Dropout(dropout))

    def forward(self, inputs):
        x, y = inputs
        x = self.second(self.first(x)) + self.skip(y)
        return self.out(x), x


class RibeiroNet(nn.Module):
    """The 1D ResNet of Ribeiro et al. 2020 (Nature Communications), with a quarter of its filters for the
    CPU.
    """

    def __init__(self, filters=(16, 32, 49, 64, 80)):
        super().__init__()
        first = nn.Conv1d(8, filters[0], 17, padding=8, bias=False)
        self.stem = nn.Sequential(first, nn.BatchNorm1d(filters[0]), nn.ReLU())
        self.blocks = nn.Sequential(*[RibeiroBlock(a, b, stride=4) for a, b in zip(filters, filters[1:])])
        self.head = nn.Linear(filters[-1] * ecg.N_SAMPLES // 4**4, 1)

    def forward(self, x):
        x = self.stem(x.transpose(1, 2))
        return self.head(self.blocks((x, x))[0].flatten(1))


class RmsAmplitude(nn.Module):
    """A network behind a division by the root mean square of all leads, which one bad lead can dominate."""

    def __init__(self, net):
        super().__init__()
        self.net = net(normalize=False)

    def forward(self, x):
        return self.net(0.2 * x / (x.square().mean(dim=(1, 2), keepdim=True).sqrt() + 1e-3))


# ---- What is compared ----------------------------------------------------------------------------
def variants():
    """name -> (function that builds the network, settings of the notebook's `train_model`)."""
    wanted = "AFNet", "Model", "augment_gain_shift_noise"
    net, four_conv, undisturbed = (notebook_source.definitions(name)[name] for name in wanted)
    final, first, original = map(
        notebook_source.training_settings, ("exp2_resnet", "exp1_long_cnn", "four_conv")
    )
    plain = partial(net, residual=False)
    unnormalised = partial(net, normalize=False)
    both = partial(net, residual=False, normalize=False)
    without_augmentation = {**final, "augment": None}
    without_disturbances = {**final, "augment": undisturbed}
    return {
        "final": (net, final),
        "no_disturbances": (net, without_disturbances),
        "no_disturbances_rms_amplitude": (partial(RmsAmplitude, net), without_disturbances),
        "no_augmentation": (net, without_augmentation),
        "no_normalisation": (unnormalised, final),
        "no_residual_no_gate": (plain, final),
        "no_residual_no_normalisation": (both, final),
        "no_residual_no_augmentation": (plain, without_augmentation),
        "no_weight_averaging": (net, {**final, "averaging": False}),
        "plain_exp1": (both, first),
        "four_conv_same_time": (four_conv, original),
        "ribeiro_same_time": (RibeiroNet, {**original, "batch_size": 32}),
    }


# ---- Training ------------------------------------------------------------------------------------
def load(real, work, device):
    """What the notebook's `train_model` finds in its globals, and five patient folds of the training exams.
    """
    folder = ecg.fetch_codesubset(real, work)
    records = folder / "train" / "RECORDS.txt"
    (work / "codesubset").mkdir(parents=True, exist_ok=True)
    with h5py.File(ecg.build_h5(records, work / "codesubset" / "train.h5"), "r") as file:
        tracings = torch.from_numpy(file["tracings"][:])
    labels = ecg.load_labels(folder / "train.csv", records)
    y = labels["AF"].to_numpy()
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0).split(y, y, labels["id_patient"])
    data = notebook_globals(tracings.to(device), y, work, device)
    return {**data, "folds": list(folds), "DATA_ID": ecg.data_fingerprint(records), "labels": labels}


def notebook_globals(tracings, y, work, device):
    """Globals of the notebook for a study: data, device, where to write; nothing is capped, nothing is timed.
    """
    return {
        "tracings": tracings,
        "y": y,
        "DEVICE": torch.device(device),
        "AMP": ecg.mixed_precision(device),
        "WORK": Path(work),
        "ECG_WORK": Path(work),
        "ECG_EPOCHS": 0,
        "DEMO": False,
        "DATA_ID": "study",
        "SECONDS": {},
        "stopwatch": lambda part, start: None,
    }


def train_fold(name, build, data, train, valid, *, seed=SEED, **settings):
    """Train on `train` with the notebook's `train_model`; its history and the logits of `valid`."""
    given = {key: value for key, value in data.items() if key != "folds"}
    space = notebook_source.definitions("train_model", **given, SEED=seed, train_idx=train, valid_idx=valid)
    ecg.seed_everything(seed)
    return space["train_model"](name, build(), part=(train, valid), **settings)


def epochs_in(seconds, build, data, train, settings):
    """As many epochs as fit into these seconds (validation takes about a tenth)."""
    model = build().to(data["DEVICE"])
    batches = ecg.BatchLoader(
        data["tracings"], data["y"], train, settings.get("batch_size", 32), shuffle=True
    )
    optimizer = torch.optim.Adam(model.parameters())
    start = time.monotonic()
    ecg.train_loop(0, batches, model, optimizer, nn.BCEWithLogitsLoss(), data["DEVICE"])
    return max(1, round(seconds / (1.1 * (time.monotonic() - start))))


def training_name(variant, k, seed):
    """Name of the files of one training run."""
    return f"{variant}_{k}" + (f"_seed{seed}" if seed != SEED else "")


def result_file(work, variant, k, seed):
    """Where the logits and seconds of one training run are kept."""
    return work / "results" / f"{training_name(variant, k, seed)}.json"


def train_all(options, choices, data):
    """Train what is asked for; `fit` loads what is trained already with the same code and settings."""
    for variant, seed, k in product(options.variants, options.seeds, options.folds):
        print(f"--- {variant}, fold {k}, seed {seed}", flush=True)
        build, settings = choices[variant]
        train, valid = data["folds"][k]
        if variant.endswith("_same_time"):
            settings = {
                **settings,
                "epochs": epochs_of_same_time(options, variant, k, seed, build, data, settings),
            }
        name = training_name(variant, k, seed)
        history, logits = train_fold(name, build, data, train, valid, seed=seed, **settings)
        weights = ecg.run_folder(options.work / "runs" / name).relative_to(options.work)
        result = {
            "logits": logits.tolist(),
            "seconds": sum(history["seconds"]),
            "epochs": len(history["epoch"]),
            "run": weights.as_posix(),
            "code": notebook_source.code_digest(),
        }
        ecg.write_json(result_file(options.work, variant, k, seed), result)


def epochs_of_same_time(options, variant, k, seed, build, data, settings):
    """Epochs for the seconds that the final network took on this fold; measured once, then kept."""
    file = result_file(options.work, variant, k, seed)
    if file.exists():
        return json.loads(file.read_text(encoding="utf-8"))["epochs"]
    final = result_file(options.work, "final", k, seed)
    if not final.exists():
        raise SystemExit(f"{variant} needs the seconds of the final network: train the variant 'final' first")
    seconds = json.loads(final.read_text(encoding="utf-8"))["seconds"]
    return epochs_in(seconds, build, data, data["folds"][k][0], settings)


# ---- Tables --------------------------------------------------------------------------------------
def metrics_table(data, results):
    """Metrics of each finished run, a DataFrame indexed by (seed, fold); F1 at the threshold of the other
    folds.
    """
    y, folds, rows = data["y"], data["folds"], {}
    for seed, k in results:
        others = [(s, j) for s, j in results if s == seed and j != k] or [(seed, k)]
        labels = np.concatenate([y[folds[j][1]] for _, j in others])
        logits = np.concatenate([results[other]["logits"] for other in others])
        threshold, _ = ecg.balanced_threshold(labels, logits)
        probability = ecg.to_probability(np.array(results[seed, k]["logits"]) - threshold)
        rows[seed, k] = ecg.classification_metrics(y[folds[k][1]], probability, prevalence=0.5)
    return pd.DataFrame(rows).T[["auroc", "ap", "f1"]]


def summary(name, table, final, results):
    """One row: mean (lowest - highest) over runs, and the difference of the same seeds' and folds' F1 to
    `final`.
    """
    cells = {key: f"{table[key].mean():.3f} ({table[key].min():.3f}-{table[key].max():.3f})" for key in table}
    gap = (table["f1"] - final["f1"]).dropna()
    seeds, folds = (table.index.get_level_values(level).nunique() for level in (0, 1))
    older = any(result["code"] != notebook_source.code_digest() for result in results.values())
    return {
        "variant": name + " (made by an earlier notebook: run it again)" * older,
        "folds x seeds": f"{folds} x {seeds}",
        **cells,
        "F1 less final's": ""
        if table is final
        else f"{gap.mean():+.3f}, higher in {(gap > 0).sum()} of {len(gap)}",
        "epochs": next(iter(results.values()))["epochs"],
        "s per fold": round(np.mean([result["seconds"] for result in results.values()])),
    }


def finished(options, choices, data):
    """name -> {(seed, fold): result} and name -> metrics of all variants with finished runs."""
    results = {}
    for variant, seed, k in product(choices, options.seeds, range(5)):
        file = result_file(options.work, variant, k, seed)
        if file.exists():
            results.setdefault(variant, {})[seed, k] = json.loads(file.read_text(encoding="utf-8"))
    return results, {variant: metrics_table(data, result) for variant, result in results.items()}


def markdown(rows):
    """Dicts with the same keys as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *[map(str, row.values()) for row in rows]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# ---- Disturbed exams -----------------------------------------------------------------------------
def filtered(x, hertz, kind):
    """Butterworth filter of (n, 4096, 8) along time, forwards and backwards."""
    sos = dsp.butter(2, hertz, kind, fs=ecg.SAMPLE_RATE, output="sos")
    return dsp.sosfiltfilt(sos, x, axis=1)


def artefacts(x, rng):
    """Artefacts to add to exams (n, 4096, 8), and the channel that each exam loses: dict of arrays in mV."""
    n, length, leads = x.shape
    lead = rng.integers(0, leads, n)
    seconds = np.arange(length)[None, :, None] / ecg.SAMPLE_RATE
    emg = filtered(rng.standard_normal(x.shape), (20, 100), "bandpass")
    emg /= emg.std()
    wander = np.sin(2 * np.pi * (rng.uniform(0.8, 2, (n, 1, 1)) * seconds + rng.random((n, 1, leads))))
    channel = np.zeros((n, 1, leads))
    channel[np.arange(n), :, lead] = 1
    start = rng.uniform(1, 8, (n, 1, 1))
    step = np.where(seconds >= start, np.exp(np.minimum(start - seconds, 0) / 0.2), 0)
    power_line = np.sin(2 * np.pi * (50 * seconds + rng.random((n, 1, 1))))
    short = (seconds >= 1.6) & (seconds < 8.6)
    return {
        "emg": emg,
        "wander": wander,
        "channel": channel,
        "step": step,
        "power_line": power_line,
        "short": short,
    }


def disturb(x, rng):
    """name -> exams (n, 4096, 8) changed as other recorders and restless patients would; amplitudes in mV."""
    add = artefacts(x, rng)
    changed = {
        "as recorded": x,
        "twice the gain": 2 * x,
        "low-pass, 25 Hz": filtered(x, 25, "lowpass"),
        "high-pass, 2 Hz": filtered(x, 2, "highpass"),
        "EMG noise, 0.1 mV": x + 0.1 * add["emg"],
        "power-line interference, 50 Hz, 0.1 mV": x + 0.1 * add["power_line"],
        "baseline wander, 0.8-2 Hz, 0.15 mV": x + 0.15 * add["wander"],
        "a flat channel": x * (1 - add["channel"]),
        "a noisy channel, 0.5 mV": x + 0.5 * add["emg"] * add["channel"],
        "a baseline step of 4 mV in a channel": x + 4 * add["step"] * add["channel"],
        "7 s": x * add["short"],
    }
    recorded = (x != 0).any(axis=2, keepdims=True)  # the padding stays zero
    return {name: (signal * recorded).astype(np.float32) for name, signal in changed.items()}


def disturbed_logits(results, choices, data, work):
    """(change, variant) -> list of (labels, logits), one of each training run, on its held-out exams."""
    pairs = {}
    for k, (_, held_out) in enumerate(data["folds"]):
        exams = data["tracings"][torch.as_tensor(held_out, device=data["tracings"].device)].cpu().numpy()
        changed = disturb(exams, np.random.default_rng(k))
        for variant, runs in results.items():
            for result in [result for (_, fold), result in runs.items() if fold == k]:
                model = choices[variant][0]()
                weights = torch.load(
                    work / result["run"] / "model.pth", map_location="cpu", weights_only=True
                )
                model.load_state_dict(weights)
                for change, signal in changed.items():
                    logits = ecg.predict(model.to(data["DEVICE"]), signal, data["DEVICE"])
                    pairs.setdefault((change, variant), []).append((data["y"][held_out], logits))
    return pairs


def disturbed_table(pairs):
    """One row a change: AUROC (mean of the runs) and F1 (all together) of each variant."""
    rows = {}
    for (change, variant), runs in pairs.items():
        y0, z0 = map(np.concatenate, zip(*pairs["as recorded", variant]))
        threshold, _ = ecg.balanced_threshold(y0, z0)
        y, z = map(np.concatenate, zip(*runs))
        f1 = ecg.classification_metrics(y, ecg.to_probability(z - threshold), prevalence=0.5)["f1"]
        auroc = [
            ecg.classification_metrics(labels, ecg.to_probability(logits))["auroc"] for labels, logits in runs
        ]
        rows.setdefault(change, {"exams": change})[variant] = f"{np.mean(auroc):.3f} / {f1:.3f}"
    return list(rows.values())


# ---- The command ---------------------------------------------------------------------------------
def parse(choices):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--real", required=True)
    parser.add_argument("--work", type=Path, default=Path("ablation"))
    parser.add_argument("--variants", nargs="+", choices=list(choices), default=list(choices))
    parser.add_argument("--folds", nargs="+", type=int, default=range(5))
    parser.add_argument("--seeds", nargs="+", type=int, default=[SEED])
    parser.add_argument(
        "--epochs", type=int, help="of every training run; default: the notebook's own numbers"
    )
    parser.add_argument("--disturbed", action="store_true")
    return parser.parse_args()


def main():
    """Train, then print the tables."""
    choices = variants()
    options = parse(choices)
    if options.epochs:
        choices = {
            name: (build, {**settings, "epochs": options.epochs})
            for name, (build, settings) in choices.items()
        }
    device = ecg.pick_device()
    data = load(options.real, options.work, device)
    train_all(options, choices, data)
    results, tables = finished(options, choices, data)
    rows = [summary(name, table, tables.get("final", table), results[name]) for name, table in tables.items()]
    print(f"\nDevice {device}, {torch.get_num_threads()} thread(s)\n\n{markdown(rows)}")
    if options.disturbed:
        pairs = disturbed_logits(results, choices, data, options.work)
        print(f"\nDisturbed exams, AUROC / F1\n\n{markdown(disturbed_table(pairs))}")


if __name__ == "__main__":
    main()
