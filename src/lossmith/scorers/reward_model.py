"""A reward model: a transformers sequence classifier with one output, whose logit is the score."""

from __future__ import annotations

import time
from collections.abc import Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossmith.errors import PolicyError, ScorerError
from lossmith.files import at_home
from lossmith.policy import check_model, check_weights, read_pretrained
from lossmith.policy.folder import in_brief
from lossmith.policy.template import template_values
from lossmith.policy.text import encode_chat
from lossmith.prompts import TEMPLATE_COLUMNS, Prompt, message_text
from lossmith.rollouts import Rollout, Score
from lossmith.scorers.seal import Seal

if TYPE_CHECKING:
    import torch

__all__ = ["RewardModel", "check_reward_model", "encode_conversation", "score_rows", "separator_of"]


class RewardModel:
    """Scores a completion with the logit that a sequence classifier gives to the whole conversation.

    `path` is a folder or a hub name, with safetensors weights; no code of the model's is ever run. The weights are
    float32, frozen, and in evaluation mode; a folder that `lossmith reward train` wrote must be as it was written, now
    and at every call. `reading` says how it reads a conversation: through its chat template; as a pair,
    prompt and completion with the separator between them (BERT and its kin); or, where it has neither, as one text,
    the prompt (its messages, a line each) followed directly by the completion.

    `max_length` is in tokens (default: what the model reads); anything longer is an error of kind `too long`, because
    cutting it would score a different text. `batch_size` is in completions, and changes no score.

    Raises ScorerError where the model does not load, has more than one output, or lacks the weights of its output
    layer (transformers would fill them at random).
    """

    def __init__(
        self, path: str | Path, *, max_length: int | None = None, batch_size: int = 16, device: str | None = None
    ) -> None:
        import torch

        check_reward_model(path)
        self.seal = Seal.of(path)
        self.name = Path(str(path)).name
        self.batch_size = batch_size
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer, model = _load(str(path))
        self.model = model.to(self.device).eval().requires_grad_(False)
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        most = self.tokenizer.model_max_length
        self.max_length = max_length or int(min(positions or most, most))
        self.separator = separator_of(self.tokenizer, model)
        self.reading = how_it_reads(self.tokenizer)

    def score(self, rollouts: Sequence[Rollout]) -> list[Score]:
        return self.score_within(rollouts, None)

    def score_within(self, rollouts: Sequence[Rollout], timeout: float | None) -> list[Score]:
        """As `score`; completions not reached when `timeout` seconds are over get an error of kind `timeout`."""
        if self.seal is not None:
            self.seal.check()
        end = None if timeout is None else time.monotonic() + timeout
        scores: list[Score] = []
        for start in range(0, len(rollouts), self.batch_size):
            if end is not None and time.monotonic() > end:
                late = Score(error=f"timeout: not reached within {timeout:g} s")
                return scores + [late] * (len(rollouts) - len(scores))
            scores += self._score_batch([self.encode(r) for r in rollouts[start : start + self.batch_size]])
        return scores if self.seal is None else [self.seal.rescaled(score) for score in scores]

    def columns_read(self, names: Set[str]) -> set[str]:
        """Those that its own chat template reads."""
        return set(names & set(TEMPLATE_COLUMNS)) if getattr(self.tokenizer, "chat_template", None) else set()

    def verify(self) -> None:
        """ScorerError if any file of a frozen model is not what was trained: every byte is read again."""
        if self.seal is not None:
            self.seal.check(full=True)

    def encode(self, rollout: Rollout) -> list[int]:
        """The token ids [T] that are scored."""
        return encode_conversation(self.tokenizer, rollout.prompt, rollout.completion)

    def _score_batch(self, rows: list[list[int]]) -> list[Score]:
        readable = [row for row in rows if 0 < len(row) <= self.max_length]
        logits = iter(self._logits(readable).tolist() if readable else [])
        return [Score(value=next(logits)) if 0 < len(row) <= self.max_length else self._refuse(row) for row in rows]

    def _refuse(self, row: list[int]) -> Score:
        if not row:
            return Score(error="none: the reward model's tokenizer made no tokens of this text")
        return Score(
            error=f"too long: {len(row)} tokens, and the reward model {self.name!r} reads {self.max_length}; "
            "shorten the prompts or the completions, or raise max_length if the model allows it"
        )

    def _logits(self, rows: list[list[int]]) -> torch.Tensor:
        """Logits [N] of ragged rows [T_i]."""
        import torch

        with torch.no_grad():
            return score_rows(self.model, rows, self.separator).float().cpu()


def encode_conversation(tokenizer: Any, prompt: Prompt, completion: str) -> list[int]:
    """The token ids [T] of a whole conversation: through the chat template, as a pair, or as one text.

    Training and scoring both call this, so that a reward model scores what it was trained on. A control token that a
    text spells out is text. ScorerError: the chat template refuses the conversation.
    """
    messages = [dict(message) for message in prompt.messages]
    if getattr(tokenizer, "chat_template", None):
        begun = messages.pop().get("content", "") if messages[-1]["role"] == "assistant" else ""
        messages.append({"role": "assistant", "content": begun + completion})
        try:
            return encode_chat(tokenizer, messages, template_values(tokenizer, prompt), answer_follows=False)
        except PolicyError as error:
            raise ScorerError(f"{prompt.source}: of the reward model: {error}") from None
    prompt_text = "\n".join(map(message_text, messages))
    if separates(tokenizer):
        return list(tokenizer(prompt_text, completion, split_special_tokens=True)["input_ids"])
    return list(tokenizer(prompt_text + completion)["input_ids"])


def separates(tokenizer: Any) -> bool:
    """Whether the tokenizer joins two texts with a token that ends the first: those of encoders (BERT, RoBERTa, T5)."""
    bare = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "b")]
    pair = list(tokenizer("a", "b")["input_ids"])
    start = next((i for i in range(len(pair)) if pair[i : i + len(bare[0])] == bare[0]), 0) + len(bare[0])
    end = next((i for i in range(start, len(pair)) if pair[i : i + len(bare[1])] == bare[1]), start)
    between = set(pair[start:end])
    return bool(between & {tokenizer.sep_token_id, tokenizer.eos_token_id}) and (
        tokenizer.sep_token_id in between or tokenizer.bos_token_id not in between
    )


def how_it_reads(tokenizer: Any) -> str:
    """How `encode_conversation` gives a conversation, in words."""
    if getattr(tokenizer, "chat_template", None):
        return "through its chat template"
    return "as a pair, prompt and completion" if separates(tokenizer) else "as one text, prompt and completion joined"


def separator_of(tokenizer: Any, model: Any) -> int | None:
    """The id after which a pair's second text begins, where the model tells the two apart by token types (BERT)."""
    types = getattr(model.config, "type_vocab_size", 0) > 1 and "token_type_ids" in tokenizer.model_input_names
    paired = types and not getattr(tokenizer, "chat_template", None) and separates(tokenizer)
    return tokenizer.sep_token_id if paired else None


def score_rows(model: Any, rows: Sequence[Sequence[int]], separator: int | None = None) -> torch.Tensor:
    """Logits [N] of ragged rows [T_i], each read at the row's own last token; with gradient where one is recorded.

    separator: as `separator_of` gives it; token types are then 0 up to the first one, and 1 after it.

    transformers reads the logit at the rightmost token that is not the padding token, found by its id. With
    pad == eos that is the token *before* a final eos. A filler that no row ends in makes it the true last one.
    """
    import torch

    last = {row[-1] for row in rows}
    filler = next(token for token in range(len(last) + 1) if token not in last)
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
    more = {}
    if separator is not None:
        first = (ids == separator).int().cumsum(1)
        more["token_type_ids"] = ((first > 0) & ~((first == 1) & (ids == separator))).long() * mask
    own = model.config.pad_token_id
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = filler
    try:
        return model(input_ids=ids, attention_mask=mask, use_cache=False, **more).logits[:, 0]
    finally:
        model.config.get_text_config().pad_token_id = model.config.pad_token_id = own


def check_reward_model(path: str | Path) -> None:
    """What can be known of a reward model without loading its weights; ScorerError where it cannot work.

    A hub name is not looked up: nothing here uses the network.
    """
    check_model(path, ScorerError, "reward model")
    if at_home(path, ScorerError).is_dir():
        _check_outputs(path)


def _check_outputs(path: str | Path) -> None:
    from transformers import AutoConfig

    place = at_home(path, ScorerError)
    try:
        outputs = AutoConfig.from_pretrained(place if place.is_dir() else path, trust_remote_code=False).num_labels
    except Exception as error:  # transformers alone runs here, and what it raises of a damaged file is anything
        where = "" if place.is_dir() else f" (there is no such folder in {Path.cwd()}, so it was looked up on the hub)"
        raise ScorerError(f"reward model {str(path)!r} cannot be read{where}: {in_brief(error)}") from None
    if outputs != 1:
        raise ScorerError(
            f"reward model {str(path)!r} has {outputs} outputs and a scorer has 1. Train it with num_labels=1; a "
            "classifier can be used through a function that says which of its outputs is the reward."
        )


def _load(path: str) -> tuple[Any, Any]:
    """(tokenizer, model) of a checked path."""
    from transformers import AutoModelForSequenceClassification

    folder = at_home(path, ScorerError)
    if not folder.is_dir():
        _check_outputs(path)
    place = str(folder) if folder.is_dir() else path
    tokenizer, model, missing = read_pretrained(
        AutoModelForSequenceClassification, place, path, ScorerError, "reward model"
    )
    if missing:
        raise ScorerError(
            f"reward model {path!r} has no weights for {', '.join(missing[:3])}; they would be random. "
            "It is probably not a reward model: save one that was trained with a one-output head."
        )
    check_weights(model, path, ScorerError)
    return tokenizer, model
