"""Functions on text, one line of a text file a call.

    burla map --input-format lines examples/words.py:word_count README.md
    burla map --input-format lines examples/words.py:common README.md
"""

import re
from collections import Counter

_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")


def word_count(text):
    """How many words the text has, as the command wc counts them."""
    return len(text.split())


def length(text):
    """How many characters the text has."""
    return len(text)


def common(text):
    """The five most common words of the text, as {word: times}."""
    return dict(Counter(word.lower() for word in _WORD.findall(text)).most_common(5))
