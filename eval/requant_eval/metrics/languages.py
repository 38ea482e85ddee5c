"""The language of a text by its commonest words; None where that is not sure.

Written for answers, which are short and may hold code: fenced code and words in capitals are passed over, and a text
with few common words, few different ones, or with those of two languages alike, is not judged.
"""

from __future__ import annotations

import re

COMMON = {
    "English": "the and of to in is that it for was with as on be this are by from at have not or you an which can",
    "German": "der die und das ist nicht ein eine zu den mit von im für auf dem des sich auch es wird sind als an bei",
    "French": "le la les et est de des une un du en que qui dans pour pas sur ce avec sont au il par plus ou elle",
    "Spanish": "el la los las de que y en un una es por con no se para del lo como más su al este son",
    "Portuguese": "o a os as de que e em um uma é para com não do da no na se por mais como ao são",
    "Italian": "il la di che e un una per è non con del della le si i in sono da dei come più gli nel",
    "Dutch": "de het een en van is dat niet op te zijn met voor die in aan er ook als wordt door om naar",
    "Swedish": "och att det som en är på av för med den till inte ett har de om jag kan från eller",
    "Danish": "og at det som en er på af for med den til ikke et har de om jeg kan fra eller der",
    "Polish": "i w na nie się że z do jest to o jak po za od przez dla są być który może",
    "Czech": "a v na se je že s z do to o jako po za od pro jsou být který může není",
    "Turkish": "ve bir bu için de da ile olarak olan daha çok gibi ne değil var kadar",
    "Indonesian": "yang dan di dari untuk dengan ini itu tidak adalah pada ke dalam akan atau dapat bisa",
    "Russian": "и в не на что с по это как для из к но от его или а у так может",
    "Ukrainian": "і в не на що з та це як для до але від його або є може також",
}
"""Language -> its commonest words."""
FEWEST = 12  # words of a text that is judged
SHARE = 0.18  # of a text's words that are common ones of its language, at least
KINDS = 5  # of a language's common words, at least: names in code repeat one or two that a language has too
TIMES = 1.4  # as many as of any other language, at least
_WORDS = {name: frozenset(words.split()) for name, words in COMMON.items()}
_WORD = re.compile(r"[^\W\d_]+")
_FENCED = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)


def language(text: str) -> str | None:
    """The language that a text is surely written in, of `COMMON`."""
    words = [word.lower() for word in _WORD.findall(_FENCED.sub(" ", text)) if len(word) == 1 or not word.isupper()]
    if len(words) < FEWEST:
        return None
    hits = sorted(((sum(word in own for word in words), name) for name, own in _WORDS.items()), reverse=True)
    (most, name), (second, _) = hits[:2]
    sure = len(_WORDS[name].intersection(words)) >= KINDS and most >= SHARE * len(words) and most >= TIMES * second
    return name if sure else None
