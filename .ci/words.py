"""Check what can be checked of how the project writes: phrases that have a plainer word, and the length of README.

    python .ci/words.py

Prints `FILE:LINE: "PHRASE": say WHAT` for every hit, and exits with 1 if there is any.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PHRASES = {
    r"says so|said aloud|(?:is|are) told(?! apart)": "reported, logged, printed, raises or warns",
    r"goes on behind|gone on with": "resumes",
    r"those of an earlier run go": "results of an earlier run are deleted",
    r"(where|if) it is not there|which is not there": "if it does not exist",
    r"what becomes of": "how each ... is mapped, or what happens to",
    r"what stands at": "an existing ...",
    r"asks? for|(?:file|model|rule|program|library|function|features)s? wants?": "requires",
    r"at hand": "available",
    r"anew": "again",
    r"thereby": "nothing: drop it",
    r"likewise": "also",
    r"the mend\b": "the fix",
    r"where there (?:is|are) (?:no|none|nothing|one)\b": "if there is",
}
FILES = ("*.py", "*.md", "*.html", "*.toml", "*.ipynb", "*.yml")
MOST_LINES, MOST_WORDS, MEAN_WORDS = 130, 30, 16


def hits(text: str) -> list[tuple[int, str, str]]:
    """Find line, phrase and remedy of each hit; a phrase may run over the end of a line."""
    found = []
    for phrase, remedy in PHRASES.items():
        spaced = re.sub(r" ", r"(?:\\s|#)+", phrase)
        for match in re.finditer(rf"(?<![\w-])(?:{spaced})(?![\w-])", text, re.IGNORECASE):
            found.append((text.count("\n", 0, match.start()) + 1, " ".join(match[0].split()), remedy))
    return found


def sentences(markdown: str) -> list[str]:
    """Split a page's prose into sentences, without code, tables, headings, pictures and addresses of links."""
    prose = re.sub(r"^```.*?^```|^( {4}|\||#|<).*?$", "", markdown, flags=re.MULTILINE | re.DOTALL)
    prose = re.sub(r"\]\([^)]*\)", "]", prose)
    prose = re.sub(r"`[^`]*`", "code", prose)
    return [part for block in re.split(r"\n\s*\n", prose) for part in re.split(r"(?<=[.?!])\s+", block) if part.strip()]


def main() -> int:
    listed = subprocess.run(["git", "ls-files", "-z", "--", *FILES], cwd=ROOT, capture_output=True, check=True).stdout
    count = 0
    for name in sorted(set(listed.decode().split("\0")) - {"", ".ci/words.py"}):
        for line, phrase, remedy in hits((ROOT / name).read_text(errors="replace")):
            print(f'{name}:{line}: "{phrase}": say {remedy}')
            count += 1
    readme = (ROOT / "README.md").read_text()
    lengths = {sentence: len(sentence.split()) for sentence in sentences(readme)}
    for sentence, words in lengths.items():
        if words > MOST_WORDS:
            print(f"README.md: {words} words, {MOST_WORDS} at most: {' '.join(sentence.split())}")
            count += 1
    if (mean := sum(lengths.values()) / len(lengths)) > MEAN_WORDS:
        print(f"README.md: {mean:.1f} words a sentence, {MEAN_WORDS} at most")
        count += 1
    if (lines := len(readme.splitlines())) > MOST_LINES:
        print(f"README.md: {lines} lines, {MOST_LINES} at most")
        count += 1
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
