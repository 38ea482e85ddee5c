"""A tokenizer of characters and chat templates that behave as public ones do, in few lines."""

from __future__ import annotations

from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

ECHO = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
STRICT = (  # no system role, turns alternate: as Gemma's
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}<{{ m.role }}>{{ m.content | trim }}</end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOOLS = (  # tools first, calls as JSON: as Qwen's
    "{% for t in tools or [] %}[{{ t | tojson }}]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}!{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}</end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
THINKING = (  # an empty thought in the last answer, none in earlier ones: as Qwen3's
    "{% for m in messages %}<{{ m.role }}>"
    "{% if m.role == 'assistant' %}{% if loop.last %}(){% endif %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}</end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
OPENED = (  # the generation prompt opens a thought that the answer leaves out: as DeepSeek-R1's
    "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}</end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>(think){% endif %}"
)
KNOWN = (  # roles that it does not know vanish
    "{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}"
    "<{{ m.role }}>{{ m.content }}</end>{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
DATED = "{{ strftime_now('%d %b %Y') }}" + ECHO
OBJECT_ARGUMENTS = (  # arguments must be an object
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "!{{ c.function.name }}{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}{% endfor %}</end>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXT_ARGUMENTS = TOOLS.replace(
    "c.function.arguments | tojson", "'' + c.function.arguments"
)  # must be text, as DeepSeek's
SHORT_IDS = (  # ids of nine characters, as Mistral's
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{% if not c.id or c.id | length != 9 %}{{ raise_exception('nine characters') }}{% endif %}"
    "#{{ c.id }}{{ c.function.name }}{% endfor %}"
    "{% if m.role == 'tool' %}{{ m.tool_call_id }}{% endif %}</end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ENDED = (  # EOS at the end unless an answer is asked for, as Phi-3's
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% else %}</s>{% endif %}"
)
PARTS = (  # content as a list of parts and nothing else, as Idefics 3's
    "{% for m in messages %}<{{ m.role }}>{% for line in m.content %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% endif %}{% endfor %}</end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(template: str | None = ECHO) -> Any:
    """One token a character, special tokens whole: positions can be read off the text."""
    special = ["<s>", "</s>", "<user>", "<assistant>", "<system>", "</end>"]
    vocabulary = {t: i for i, t in enumerate([*special, *map(chr, range(32, 127)), "\n", "é", "[UNK]"])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"</?(?:s|user|assistant|system|end)>|[\s\S]"), "isolated")
    raw.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="[UNK]")
    made.chat_template = template
    return made
