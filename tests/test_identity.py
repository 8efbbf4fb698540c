"""Which result is this? Another digest wherever the result may change, the same one where only the text changed."""
import collections
import functools
import importlib.util
import inspect
import sys
import types
from contextlib import suppress

import h5py
import numpy as np
import pytest
import torch
from sklearn import metrics

import ecg_helpers as helpers

CELLS = '''
import functools
import numpy as np
import torch
from torch.nn import functional as F
GAIN, WINDOW = 0.3, np.linspace(0, 1, 64)
traces = "a global that the functions below only seem to use"
class Layer(torch.nn.Module):
    SCALE = 2.0
    @staticmethod
    def bent(x):
        return x.clamp(-3, 3)
    @property
    def half(self):
        return 0.5
    def pooled(self, x):
        return x.amax(dim=1)  # over time
class Net(Layer):
    def __init__(self, normalize=True):
        super().__init__()
        self.normalize, self.function = normalize, F.relu
        self.linear, self.act, self.last = torch.nn.Linear(8, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1)
    def forward(self, traces: torch.Tensor):
        x = traces / traces.abs().amax((1, 2), keepdim=True) if self.normalize else traces
        return self.last(self.act(self.linear(self.bent(self.pooled(x)) * self.SCALE * self.half)))
def gain(x):
    return x * (1 + GAIN * torch.cos(x.sum((1, 2), keepdim=True)))
@torch.no_grad()
def sway(x):
    return x + 0.01 * torch.as_tensor(WINDOW, dtype=x.dtype)[None, :, None]
def drift(amount):
    def inner(x):
        return x + amount
    return inner
def augment(x, *, after=5):
    def shifted(x):
        return x.roll(after, dims=1) + 3
    return drifts[1](shifted(sway(gain(x))))
class Augmenter:
    def __init__(self, strength):
        self.strength = strength
    def __call__(self, x):
        return x * self.strength
drifts = [drift(0.1), drift(0.2)]
weighted = functools.partial(torch.optim.AdamW, weight_decay=0.01)
def build():
    return Net(), augment, Augmenter(0.9), Augmenter(2).__call__, weighted, lambda p, lr: torch.optim.SGD(p, lr, 0.8)
'''
EDITS = {  # what is edited: (the text, what it becomes)
    "method": ("x.amax(dim=1)  #", "x.mean(dim=1)  #"),
    "class attribute": ("SCALE = 2.0", "SCALE = 2.1"),
    "static method": ("clamp(-3, 3)", "clamp(-3, 2)"),
    "property": ("return 0.5", "return 0.6"),
    "default of a network": ("normalize=True", "normalize=False"),
    "function as attribute": ("normalize, F.relu", "normalize, F.gelu"),
    "global number": ("WINDOW = 0.3", "WINDOW = 0.4"),
    "global array": ("np.linspace(0, 1, 64)", "np.linspace(0, 2, 64)"),
    "called function": ("torch.cos(x", "torch.sin(x"),
    "under a decorator of torch": ("x + 0.01 * torch", "x + 0.02 * torch"),
    "nested function": ("dims=1) + 3", "dims=1) + 4"),
    "keyword default": ("after=5", "after=6"),
    "closure in a list": ("drift(0.2)", "drift(0.3)"),
    "attribute of an object": ("Augmenter(0.9)", "Augmenter(0.8)"),
    "object of a bound method": ("Augmenter(2)", "Augmenter(3)"),
    "partial": ("weight_decay=0.01", "weight_decay=0.02"),
    "constant in a factory": ("SGD(p, lr, 0.8)", "SGD(p, lr, 0.9)"),
}
HARMLESS = {
    "comment": ("  # over time", "  # over all samples"),
    "layout": ("x * (1 + GAIN * torch", "(\n        x) * (1 +\n        GAIN * torch"),
    "annotation": ("traces: torch.Tensor", "traces"),
    "unrelated function": ("GAIN, WINDOW", "def unused(x):\n    return x\n\nGAIN, WINDOW"),
    "a global of a local's name": ('traces = "a global', 'traces = "another global'),
}
WRAPPER = "import functools\ndef wrap(g):\n @functools.wraps(g)\n def h(x): return 1 * g(x)\n return h\n"
TRICKY = {  # text that defines f, what is edited: another digest, or none; never the same one
    "own decorator": (WRAPPER + "@wrap\ndef f(x): return x", "1 *", "2 *"),
    "attribute of a function": ("def f(x): return x * f.w\nf.w = 1", "w = 1", "w = 2"),
    "attributes from a dict": ("class O(dict): __getattr__ = dict.get\no = O(w=1)\ndef f(x): return o.w", "=1", "=2"),
    "cached property": ("import functools\nclass f:\n @functools.cached_property\n def g(s): return 1", "n 1", "n 2"),
    "starting weight": ("import torch\nf = torch.nn.BatchNorm1d(2)\nf.bias.data += 1", "= 1", "= 2"),
    "frozen layer": ("import torch\nf = torch.nn.BatchNorm1d(2).requires_grad_(True)", "True", "False"),
    "module of a library": ("import numpy as xp\ndef f(x): return xp.abs(x)", "numpy", "torch"),
    "import in a function": ("def f(x):\n import numpy as xp\n return xp.abs(x)", "numpy", "torch"),
    "end of a long pattern": ("import re\nf = re.compile('a' * 300 + 'b')", "'b'", "'c'"),
    "list for tuple": ("i = (0, 1)\ndef f(x): return x[i]", "(0, 1)", "[0, 1]"),
    "number with methods": ("class N(int):\n def g(self): return 1\nn = N(3)\ndef f(x): return n.g()", "n 1", "n 2"),
    "argument of a decorator": ("import torch\n@torch.inference_mode(True)\ndef f(x): return x", "True", "False"),
    "no decorator any more": ("import torch\n@torch.no_grad()\ndef f(x): return x", "@torch.no_grad()", ""),
    "cached function": ("from functools import lru_cache\n@lru_cache\ndef f(x): return 1", "n 1", "n 2"),
    "function that a library makes": ("import torch\nf = torch.vmap(lambda x: x, in_dims=0)", "=0", "=1"),
    "ufunc of an own function": ("import numpy as np\nf = np.frompyfunc(lambda x: 1, 1, 1)", "x: 1", "x: 2"),
    "own descriptor": ("class D:\n w = 1\n def __get__(s, o, c): return s.w\nclass f: d = D()\nf", "w = 1", "w = 2"),
    "argument of a method": ("import functools as t\nclass f:\n g = t.partialmethod(print, 1)", "t, 1", "t, 2"),
    "mask of an array": ("import numpy as np\nf = np.ma.masked_array([1.0, 2.0], [True, False])", "[True", "[False"),
    "method of a list": ("f = [1, 2].__len__", "2]", "2, 3]"),
    "what a try spans": ("def f(x):\n try: x.a(); x.b()\n except Exception: x.c()", "try: x.a();", "x.a()\n try:"),
    "class as a key": ("class N:\n def g(s): return 1\nk = {N: 1}\ndef f(x): return k", "n 1", "n 2"),
    "own layer under a parametrization": (
        "import torch\nfrom torch.nn.utils.parametrizations import spectral_norm\n"
        "class L(torch.nn.Linear):\n def forward(s, x): return 1\nf = torch.manual_seed(0) and spectral_norm(L(2, 2))",
        "n 1", "n 2"),
    "tied weights": ("import torch\na = torch.ones(2)\nf = [a, a.clone()]", "a.clone()", "a"),
    "hook": ("import torch\nf = torch.ones(2).requires_grad_()\nf.register_hook(lambda g: 1)", ": 1", ": 2"),
    "kind of array": ("import numpy as np\nimport torch\nf = np.ones(2)", "np.ones(2)", "torch.ones(2).double()"),
    "own partial": ("import functools as t\nclass P(t.partial):\n def g(s): return 1\nf = P(max)", "n 1", "n 2"),
    "captured argument": ("def f(x, low, high): return [y * low for y in x]", "* low", "* high"),
    "unknown module": ("__name__ = 'loaded by its path'\ndef f(x): return 1", "n 1", "n 2"),
}
HIDDEN = {  # what has a state that nothing describes
    "generator": lambda file: (x for x in range(3)),
    "torch.Generator": lambda file: torch.Generator(),
    "NumPy's generator": lambda file: np.random.default_rng(1),
    "deque": lambda file: collections.deque([1]),
    "method of a deque": lambda file: collections.deque([1]).append,
    "open file": lambda file: open(file, "rb"),
    "open dataset": lambda file: h5py.File(file, "r")["tracings"],
}
USUAL = {
    "recurrent network": lambda: torch.nn.LSTM(8, 2),
    "ellipsis": lambda: lambda x: x[..., 0, 2:],
    "method of tensors": lambda: torch.Tensor.relu,
    "reversed array": lambda: np.arange(3.0)[::-1],
    "function of NumPy": lambda: np.mean,
    "function of scikit-learn": lambda: metrics.roc_auc_score,
    "decorated by PyTorch": lambda: torch.autocast("cpu")(lambda x: x),
    "imports in a function": lambda: run_cells(
        "def f(x):\n import torch.nn.functional as F\n from scipy.linalg import hilbert\n return F.relu(x)").f,
    "settings": lambda: types.SimpleNamespace(a=1),
}


def run_cells(text):
    """Names that `text` defines, as in a notebook: classes and functions without a file."""
    space = {"__name__": "__main__"}
    exec(compile(text, "<cell>", "exec"), space)
    return types.SimpleNamespace(**space)


@pytest.mark.parametrize("what", [*EDITS, *HARMLESS])
def test_an_edit_is_another_run_but_comments_and_unrelated_code_are_not(what):
    old, new = {**EDITS, **HARMLESS}[what]
    assert CELLS.count(old) == 1
    cells = [run_cells(text) for text in (CELLS, CELLS.replace(old, new))]
    first, edited = [torch.manual_seed(0) and helpers.identity(*cell.build()) for cell in cells]
    assert (first != edited) == (what in EDITS)


@pytest.mark.parametrize("what", list(TRICKY))
def test_a_tricky_edit_is_never_the_same_run(what):
    text, old, new = TRICKY[what]
    assert text.count(old) == 1
    with suppress(TypeError):  # not described: trained anew
        assert helpers.identity(run_cells(text).f) != helpers.identity(run_cells(text.replace(old, new)).f)


USES = {
    "module": "import own_filters\ndef f(x): return own_filters.smooth(x)",
    "function": "from own_filters import smooth\ndef f(x): return smooth(x)",
    "comprehension": "import own_filters\ndef f(x): return [own_filters.smooth(y) for y in x]",
    "argument": "import own_filters as o\ndef call(lib, x): return lib.smooth(x)\ndef f(x): return call(o, x)",
    "in the function": "def f(x):\n    import own_filters\n    return [own_filters.smooth(y) for y in x]",
    "package": "def f(x):\n    from own_package import own_filters\n    return own_filters.smooth(x)",
    "in a package": "def f(x):\n    from own_package.own_filters import smooth\n    return smooth(x)",
}


@pytest.mark.parametrize("use", list(USES))
def test_an_edit_of_an_own_file_is_another_run(tmp_path, monkeypatch, use):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def digest(factor):
        for folder in (tmp_path, tmp_path / "own_package"):
            folder.mkdir(exist_ok=True)
            (folder / "own_filters.py").write_text(f"FACTOR = {factor}\ndef smooth(x): return FACTOR * x\n")
        importlib.invalidate_caches()
        for name in [name for name in sys.modules if name.startswith("own_")]:  # as after a restart
            del sys.modules[name]
        return helpers.identity(run_cells(USES[use]).f)
    assert digest(0.9) != digest(0.8) and digest(0.9) == digest(0.9)


@pytest.mark.parametrize("what", HIDDEN)
def test_what_cannot_be_described_has_no_digest(what, demo_h5):
    state, holder = HIDDEN[what](demo_h5), run_cells("class Holder: pass").Holder()
    holder.inside = [state]
    for thing in (state, holder, lambda x: x + state, functools.partial(max, state), {"a": state}):
        with pytest.raises(TypeError):
            helpers.identity(thing)


@pytest.mark.parametrize("what", list(USUAL))
def test_what_networks_are_made_of_has_a_digest(what):
    found = [torch.manual_seed(0) and helpers.identity(USUAL[what]()) for _ in range(2)]
    assert found[0] == found[1]


# ---- The digest within `fit` ----
def train(run_dir, module=helpers, **changes):
    """One epoch of a tiny network on 24 exams; `changes` go to `fit`. Returns the history and the number of runs."""
    traces = torch.randn(24, 64, 8, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    arguments = {"epochs": 1, "lr": 0.01, "device": "cpu", "run_dir": run_dir, **changes}
    history = module.fit(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(512, 1)), traces,
                         np.arange(24) % 3 == 0, np.arange(16), np.arange(16, 24), **arguments)
    return history, len(list(run_dir.iterdir()))


def test_undoing_an_edit_finds_the_first_run_and_a_label_is_no_edit(tmp_path, capsys):
    first, again, other = (run_cells(CELLS).Augmenter(strength) for strength in (0.9, 0.9, 0.8))
    history, runs = train(tmp_path, augment=first)
    assert runs == 1 and train(tmp_path, augment=other)[1] == 2 and "loaded" not in capsys.readouterr().out
    assert train(tmp_path, augment=again, verbose=False, device=torch.device("cpu")) == (history, 2)
    assert "loaded" in capsys.readouterr().out


def test_other_arguments_are_other_runs(tmp_path):
    others = [{}, {"lr": 0.02}, {"seed": 1}, {"batch_size": 8}, {"select": "last"}, {"data": "other"}, {"epochs": 2},
              {"ema_decay": 0.9}, {"loss_function": torch.nn.BCEWithLogitsLoss()}]
    assert [train(tmp_path, **changes)[1] for changes in others] == list(range(1, 10))


def test_a_run_that_cannot_be_described_is_trained_each_time(tmp_path, capsys):
    rng = np.random.default_rng(1)
    assert [train(tmp_path, augment=lambda traces: traces * float(rng.uniform()))[1] for _ in range(2)] == [1, 2]
    assert capsys.readouterr().out.count("trained anew") == 2


@pytest.mark.parametrize("name", ["train_loop", "eval_loop", "forward", "to_probability", "best_epoch", "make_loader"])
def test_an_edit_of_the_helpers_is_another_run(tmp_path, name):
    text, source = inspect.getsource(helpers), inspect.getsource(getattr(helpers, name))
    edited = source.replace("\n    return ", "\n    str()\n    return ", 1)
    for content, runs in ((text, 1), (text + "\n\n# the end\n", 1), (text.replace(source, edited), 2)):
        copy = tmp_path / "ecg_helpers.py"
        copy.write_text(content, encoding="utf-8")
        spec = importlib.util.spec_from_file_location("ecg_helpers", copy)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        assert train(tmp_path / "run", module)[1] == runs
