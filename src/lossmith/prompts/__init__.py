"""x ~ D: the input-only data set. Prompts, columns for the scorer, and no gold answers."""

from lossmith.prompts.content import chat_in_text
from lossmith.prompts.json_values import plain
from lossmith.prompts.load import default_prompts_path, is_target, load_prompts
from lossmith.prompts.prompt import SYSTEM_COLUMNS, TEMPLATE_COLUMNS, Prompt, PromptSet, message_text, prompt_content
from lossmith.prompts.sources import read_rows

__all__ = [
    "SYSTEM_COLUMNS",
    "TEMPLATE_COLUMNS",
    "Prompt",
    "PromptSet",
    "chat_in_text",
    "default_prompts_path",
    "is_target",
    "load_prompts",
    "message_text",
    "plain",
    "prompt_content",
    "read_rows",
]
