"""What each idea of the final network is worth, over five patient folds of real ECGs.

    python tests/ablation.py --real PATH --work FOLDER [--variants final no_normalisation ...] [--folds 0 1 2 3 4]
                             [--seeds 42 43 44] [--disturbed]

PATH: a codesubset/ folder or an archive of one; only its training exams are used. Each variant is trained on four
fifths of the patients and scored on the fifth; AP and F1 are weighted to 50 % AF. F1 is at the threshold that the
*other* folds' out-of-fold logits (of the same seed) give, so no exam takes part in its own decision. The last column
compares fold by fold and seed by seed with the final network, where both were trained. Finished trainings are kept in
FOLDER, so the table can be completed in several sittings. Models and recipe are read from the notebook.

--disturbed adds a second table: the finished variants on the same held-out exams, disturbed as other recorders and
restless patients would, at the decision of the undisturbed exams.
"""
import argparse
import ast
import json
import sys
import time
from functools import partial
from itertools import product
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import torch
from scipy import signal as dsp
from sklearn.model_selection import StratifiedGroupKFold
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
SEED = 42  # where no other is asked for
sys.path.insert(0, str(ROOT))

import ecg_helpers as ecg  # noqa: E402


def notebook_definitions():
    """Functions and classes that the notebook defines, by name (models, augmentation)."""
    notebook = json.loads((ROOT / "assignment_ecg_classification.ipynb").read_text(encoding="utf-8"))
    space = {"nn": nn, "torch": torch, "ecg": ecg, "np": np, "partial": partial}
    wanted = {"ModelBaseline", "LinearModel", "TimeConv", "as_image", "Model", "Gate", "Stage", "AFNet", "augment_gain_shift_noise",
              "add_disturbances", "shorten", "augment_exams", "estimate_prevalence"}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or source.startswith("%%") or not any(name in source for name in wanted):
            continue
        tree = ast.parse("\n".join("" if line.lstrip().startswith("%") else line for line in source.splitlines()))
        tree.body = [node for node in tree.body if getattr(node, "name", None) in wanted]
        exec(compile(tree, "notebook", "exec"), space)
    return space


class RibeiroBlock(nn.Module):
    """Residual block of Ribeiro et al. 2020: two convolutions, the second strided; max-pooled skip connection."""

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
    """The 1D ResNet of Ribeiro et al. 2020 (Nature Communications), with a quarter of its filters for the CPU."""

    def __init__(self, filters=(16, 32, 49, 64, 80)):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(8, filters[0], 17, padding=8, bias=False), nn.BatchNorm1d(filters[0]), nn.ReLU())
        self.blocks = nn.Sequential(*[RibeiroBlock(a, b, stride=4) for a, b in zip(filters, filters[1:])])
        self.head = nn.Linear(filters[-1] * ecg.N_SAMPLES // 4**4, 1)

    def forward(self, x):
        x = self.stem(x.transpose(1, 2))
        return self.head(self.blocks((x, x))[0].flatten(1))


def rms_size(net):
    """`net` with the exam divided by the root mean square of all leads, which one bad lead can dominate."""
    class RmsNet(net):
        def forward(self, x):
            return super().forward(0.2 * x / (x.square().mean(dim=(1, 2), keepdim=True).sqrt() + 1e-3))

    return RmsNet(normalize=False)


def variants(space):
    """name -> (model factory, settings of `train_fold`)."""
    net, full = space["AFNet"], {"augment": space["augment_exams"]}
    plain, undisturbed = partial(net, residual=False), {"augment": space["augment_gain_shift_noise"]}
    original = dict(recipe="original", same_time=True)
    return {
        "final": (net, full),
        "no_disturbances": (net, undisturbed),
        "no_disturbances_rms_size": (partial(rms_size, net), undisturbed),
        "no_augmentation": (net, {"augment": None}),
        "no_normalisation": (partial(net, normalize=False), full),
        "no_residual_no_gate": (plain, full),
        "no_residual_no_normalisation": (partial(plain, normalize=False), full),
        "no_residual_no_augmentation": (plain, {"augment": None}),
        "no_weight_averaging": (net, {**full, "averaging": False}),
        "plain_exp1": (partial(plain, normalize=False), dict(recipe="original", epochs=20, batch_size=32)),
        "four_conv_same_time": (space["Model"], {**original, "batch_size": 16}),
        "ribeiro_same_time": (RibeiroNet, {**original, "batch_size": 32}),
    }


def train_fold(build, data, train, valid, folder, device, *, recipe="final", augment=None, averaging=True, epochs=30,
               batch_size=32, same_time=False, seconds=None, seed=SEED):
    """Train on `train`, return the logits of `valid` and the seconds of training."""
    torch.manual_seed(seed)
    model = build().to(device)
    batches, held_out = (ecg.BatchLoader(data["tracings"], data["y"], i, n, shuffle=s)
                         for i, n, s in ((train, batch_size, True), (valid, 64, False)))
    n_af = data["y"][train].sum()
    loss = nn.BCEWithLogitsLoss(pos_weight=torch.tensor((len(train) - n_af) / n_af, dtype=torch.float32)).to(device)
    if same_time:  # as many epochs as fit into the seconds of the final network
        start, probe = time.monotonic(), build().to(device)
        ecg.train_loop(0, batches, probe, torch.optim.Adam(probe.parameters()), loss, device)
        epochs = max(1, round(seconds / (1.1 * (time.monotonic() - start))))  # validation takes about a tenth
    if recipe == "original":
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-4)
        more = dict(scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=3))
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
        more = dict(scheduler=torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * len(batches), pct_start=0.25),
                    ema_decay=0.99 if averaging else None, max_norm=1.0, select="last", augment=augment)
    history = ecg.fit(model, batches, held_out, optimizer=optimizer, loss_function=loss, epochs=epochs, device=device, run_dir=folder,
                      seed=seed, amp_dtype=ecg.mixed_precision(device), **more)
    return ecg.predict(model, data["tracings"][torch.as_tensor(valid)], device), sum(history["seconds"]), epochs


def load(real, work):
    """Tracings, labels and five patient folds of the training exams."""
    folder = ecg.fetch_codesubset(real, work)
    records = folder / "train" / "RECORDS.txt"
    (work / "codesubset").mkdir(parents=True, exist_ok=True)
    with h5py.File(ecg.build_h5(records, work / "codesubset" / "train.h5"), "r") as file:
        tracings = torch.from_numpy(file["tracings"][:])
    labels = ecg.load_labels(folder / "train.csv", records)
    y = labels["AF"].to_numpy()
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=0).split(y, y, labels["id_patient"])
    return {"tracings": tracings, "y": y, "folds": [(a, b) for a, b in folds]}


def training_name(variant, k, seed):
    """Name of the files of one training."""
    return f"{variant}_{k}" + (f"_seed{seed}" if seed != SEED else "")


def metrics_table(data, results):
    """Metrics of each finished training, a DataFrame indexed by (seed, fold); F1 at the threshold of the other folds."""
    y, rows = data["y"], {}
    for seed, k in results:
        others = [(s, j) for s, j in results if s == seed and j != k] or [(seed, k)]
        threshold, _ = ecg.balanced_threshold(np.concatenate([y[data["folds"][j][1]] for _, j in others]),
                                              np.concatenate([results[other]["logits"] for other in others]))
        probability = ecg.to_probability(np.array(results[seed, k]["logits"]) - threshold)
        rows[seed, k] = ecg.classification_metrics(y[data["folds"][k][1]], probability, prevalence=0.5)
    return pd.DataFrame(rows).T[["auroc", "ap", "f1"]]


def summary(name, table, final, results):
    """One row: mean (lowest - highest) over trainings, and the difference of the same seeds' and folds' F1 to `final`."""
    cells = {key: f"{table[key].mean():.4f} ({table[key].min():.3f}-{table[key].max():.3f})" for key in table}
    gap = (table["f1"] - final["f1"]).dropna()
    return {"variant": name, "folds": table.index.get_level_values(1).nunique(), "seeds": table.index.get_level_values(0).nunique(),
            **cells, "epochs": next(iter(results.values()))["epochs"],
            "s a fold": round(np.mean([r["seconds"] for r in results.values()])),
            "F1 less final's": f"{gap.mean():+.3f}, higher in {(gap > 0).sum()} of {len(gap)}"}


def disturb(x, rng):
    """name -> exams (n, 4096, 8) changed as other recorders and restless patients would; sizes in mV."""
    n, length, leads = x.shape
    seconds, exam, lead = np.arange(length)[None, :, None] / ecg.SAMPLE_RATE, np.arange(n), rng.integers(0, leads, n)
    recorded = (x != 0).any(axis=2, keepdims=True)

    def filtered(signal, hertz, kind):
        return dsp.sosfiltfilt(dsp.butter(2, hertz, kind, fs=ecg.SAMPLE_RATE, output="sos"), signal, axis=1)

    muscles = filtered(rng.standard_normal(x.shape), (20, 100), "bandpass")
    muscles /= muscles.std()
    wander = np.sin(2 * np.pi * (rng.uniform(0.8, 2, (n, 1, 1)) * seconds + rng.random((n, 1, leads))))
    one = np.zeros((n, 1, leads))
    one[exam, :, lead] = 1
    start = rng.uniform(1, 8, (n, 1, 1))
    jump = np.where(seconds >= start, np.exp(np.minimum(start - seconds, 0) / 0.2), 0)
    short = (seconds >= 1.6) & (seconds < 8.6)
    changed = {"as recorded": x, "twice the gain": 2 * x, "only below 25 Hz": filtered(x, 25, "lowpass"),
               "only above 2 Hz": filtered(x, 2, "highpass"), "muscles, 0.1 mV": x + 0.1 * muscles,
               "hum of 50 Hz, 0.1 mV": x + 0.1 * np.sin(2 * np.pi * (50 * seconds + rng.random((n, 1, 1)))),
               "wander of 0.8-2 Hz, 0.15 mV": x + 0.15 * wander, "a dead lead": x * (1 - one),
               "a noisy lead, 0.5 mV": x + 0.5 * muscles * one, "a jump of 4 mV in a lead": x + 4 * jump * one, "7 s": x * short}
    return {name: (signal * recorded).astype(np.float32) for name, signal in changed.items()}


def disturbed_table(names, choices, data, work, seeds):
    """AUROC (mean of the trainings) and F1 (all together) of the variants on disturbed exams."""
    pairs = {}  # (change, variant) -> labels and logits of each training's held-out exams
    for k, (_, held_out) in enumerate(data["folds"]):
        files = {(name, seed): work / "runs" / training_name(name, k, seed) / "model.pth" for name, seed in product(names, seeds)}
        changed = disturb(data["tracings"][torch.as_tensor(held_out)].numpy(), np.random.default_rng(k))
        for (name, _), file in files.items():
            if not file.exists():
                continue
            model = choices[name][0]()
            model.load_state_dict(torch.load(file, weights_only=True))
            for change, signal in changed.items():
                pairs.setdefault((change, name), []).append((data["y"][held_out], ecg.predict(model, signal, "cpu")))
    table = pd.DataFrame()
    for (change, name), trainings in pairs.items():
        threshold, _ = ecg.balanced_threshold(*map(np.concatenate, zip(*pairs["as recorded", name])))
        scores = [ecg.classification_metrics(y, ecg.to_probability(z - threshold), prevalence=0.5)
                  for y, z in [*trainings, tuple(map(np.concatenate, zip(*trainings)))]]
        table.loc[change, name] = f"{np.mean([s['auroc'] for s in scores[:-1]]):.3f} / {scores[-1]['f1']:.3f}"
    return table


def main():
    """Train what is not trained yet and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = variants(notebook_definitions())
    parser.add_argument("--real", required=True)
    parser.add_argument("--work", type=Path, default=Path("ablation"))
    parser.add_argument("--variants", nargs="+", choices=list(choices), default=list(choices))
    parser.add_argument("--folds", nargs="+", type=int, default=range(5))
    parser.add_argument("--seeds", nargs="+", type=int, default=[SEED])
    parser.add_argument("--disturbed", action="store_true")
    options = parser.parse_args()
    data, device = load(options.real, options.work), ecg.pick_device()
    for name, seed, k in product(options.variants, options.seeds, options.folds):
        (build, settings), file = choices[name], options.work / "results" / f"{training_name(name, k, seed)}.json"
        if file.exists():
            continue
        print(f"--- {name}, fold {k}, seed {seed}", flush=True)
        final = options.work / "results" / f"{training_name('final', k, seed)}.json"
        budget = json.loads(final.read_text())["seconds"] if settings.get("same_time") else None
        logits, seconds, epochs = train_fold(build, data, *data["folds"][k], options.work / "runs" / training_name(name, k, seed), device,
                                             seconds=budget, seed=seed, **settings)
        ecg.write_json(file, {"logits": logits.tolist(), "seconds": seconds, "epochs": epochs})
    rows, tables = [], {}
    for name in choices:
        files = {(seed, k): options.work / "results" / f"{training_name(name, k, seed)}.json" for seed in options.seeds for k in range(5)}
        results = {key: json.loads(file.read_text()) for key, file in files.items() if file.exists()}
        if results:
            tables[name] = metrics_table(data, results)
            rows.append(summary(name, tables[name], tables.get("final", tables[name]), results))
    print(f"device {device}, {torch.get_num_threads()} threads\n" + pd.DataFrame(rows).to_string(index=False))
    if options.disturbed:
        print("\nDisturbed exams, AUROC / F1:\n" + disturbed_table(tables, choices, data, options.work, options.seeds).to_string())


if __name__ == "__main__":
    main()
