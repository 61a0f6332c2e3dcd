"""A reward model: a transformers sequence classifier with one output, whose logit is the score."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lossmith.errors import ScorerError
from lossmith.files import at_home
from lossmith.policy import check_model, check_weights, read_pretrained
from lossmith.policy.folder import in_brief
from lossmith.prompts import Prompt
from lossmith.rewards.seal import Seal
from lossmith.rollouts import Rollout, Score

if TYPE_CHECKING:
    import torch

__all__ = ["RewardModel", "check_reward_model", "encode_conversation", "score_rows"]


class RewardModel:
    """Scores a completion with the logit that a sequence classifier gives to the whole conversation.

    `path` is a folder or a hub name, with safetensors weights; no code of the model's is ever run. The weights are
    float32, frozen, and in evaluation mode; a folder that `lossmith reward train` wrote must be as it was written, now
    and whenever it is asked. Where the tokenizer has a chat template the conversation goes through it;
    else the text is the prompt (its messages, a line each) followed directly by the completion.

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
        self.max_length = max_length or _reads(self.tokenizer, model)

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
            return score_rows(self.model, rows).float().cpu()


def encode_conversation(tokenizer: Any, prompt: Prompt, completion: str) -> list[int]:
    """The token ids [T] of a whole conversation: through the chat template, or the prompt and the text after it.

    Training and scoring both call this, so that a reward model is asked about what it was taught.
    """
    if not getattr(tokenizer, "chat_template", None):
        said = "\n".join(message["content"] for message in prompt.messages)
        return tokenizer(said + completion)["input_ids"]
    messages = [dict(message) for message in prompt.messages]
    begun = messages.pop()["content"] if messages and messages[-1]["role"] == "assistant" else ""
    messages.append({"role": "assistant", "content": begun + completion})
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]  # the template wrote them


def score_rows(model: Any, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits [N] of ragged rows [T_i], each read at the row's own last token; with gradient where one is recorded.

    transformers reads the logit at the rightmost token that is not the padding token, found by its id. With
    pad == eos that is the token *before* a final eos. A filler that no row ends in makes it the true last one.
    """
    import torch

    last = {row[-1] for row in rows}
    filler = next(token for token in range(len(last) + 1) if token not in last)
    width = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[filler] * (width - len(row))] for row in rows], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
    own = model.config.pad_token_id
    model.config.get_text_config().pad_token_id = model.config.pad_token_id = filler
    try:
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0]
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
        where = "" if place.is_dir() else f" (there is no such folder in {Path.cwd()}, so the hub was asked)"
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


def _reads(tokenizer: Any, model: Any) -> int:
    """The most tokens the model reads, as far as it says."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or tokenizer.model_max_length
    return int(min(positions, tokenizer.model_max_length))
