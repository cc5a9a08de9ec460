"""Wikipedia's articles out of a package of the Python index, as people write them or in the form that WikiText has.

    pip install --no-deps gensim==4.4.0 && pip install mwparserfromhell sacremoses
    python benchmarks/wikipedia.py wiki.txt --form wikitext --tokenizer SRC --tokens 170000

They are 104 long ones of an English dump, some 600 thousand tokens, which gensim's tests read. WikiText's form is that
of Moses' tokenizer with dashes split (`@-@`, and `@,@` and `@.@` in numbers), where rare words are `<unk>` and headings
stand in as many equals signs as they are deep.
"""

import bz2
import importlib.util
import re
from collections import Counter
from collections.abc import Iterator
from itertools import starmap
from pathlib import Path
from xml.etree import ElementTree

import click

DUMP = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
LEFT_OUT = ("ref", "table", "gallery", "math")
ENDS = re.compile(r"\n\s*(?:§\d )?(See also|References|External links|Notes|Further reading|Bibliography)\s*\n")
HEADING = re.compile(r"§(\d) (.+)")
"""Of a depth, the title's being one; equals signs would be read as a heading again."""
RARE = 2
"""Words that occur so often at most are `<unk>`: 5.5 % of all, as in WikiText-2."""


def pages(dump: Path) -> Iterator[tuple[str, str]]:
    """Yield the title and the wikitext of every article of a compressed dump."""
    with bz2.open(dump) as file:
        for _, element in ElementTree.iterparse(file):
            if element.tag.endswith("}page"):
                fields = {part.tag.split("}")[1]: part.text for part in element.iter()}
                text = fields.get("text") or ""
                if fields.get("ns", "0") == "0" and not text.lower().startswith("#redirect"):
                    yield fields["title"] or "", text


def lines_of(title: str, wikitext: str) -> list[str]:
    """Return the paragraphs of an article with its headings, without tables, captions and what stands behind the text.

    Headings are those of `HEADING`, and only those that have paragraphs.
    """
    import mwparserfromhell

    code = mwparserfromhell.parse(wikitext)
    for tag in code.filter_tags(matches=lambda node: str(node.tag).lower() in LEFT_OUT):
        if code.contains(tag):  # otherwise it was inside of one that is gone
            code.remove(tag)
    for heading in code.filter_headings():
        heading.title = f"§{heading.level} {heading.title.strip_code().strip()}"
    lines = (line.strip() for line in ENDS.split(code.strip_code(normalize=True, collapse=True))[0].split("\n"))
    kept: list[str] = []
    above = [f"§1 {title}"]
    for line in lines:
        if HEADING.fullmatch(line):
            above = [one for one in above if one[1] < line[1]] + [line]
        elif len(line) > 60 and not ("|" in line or "thumb" in line or line.startswith(("File", "Image", "Category"))):
            kept += [*above, line]
            above = []
    return kept


def plain(lines: list[str]) -> str:
    """Return the paragraphs of an article."""
    return "\n".join(line for line in lines if not HEADING.fullmatch(line))


def in_wikitext_form(articles: list[list[str]]) -> str:
    """Return articles as WikiText writes them."""
    from sacremoses import MosesTokenizer

    tokenizer = MosesTokenizer("en")

    def split(line: str) -> list[str]:
        if heading := HEADING.fullmatch(line):
            signs = ["="] * int(heading[1])
            return [*signs, *split(heading[2]), *signs]
        words = " ".join(tokenizer.tokenize(line, aggressive_dash_splits=True, escape=False))
        return re.sub(r"(?<=\d)([,.])(?=\d)", r" @\1@ ", words).split()

    lines = [split(line) for article in articles for line in article]
    counts = Counter(word for line in lines for word in line)

    def written(line: list[str]) -> str:
        text = f" {' '.join(word if counts[word] > RARE else '<unk>' for word in line)} \n"
        return f" \n{text} \n" if line[0] == "=" else text

    return "".join(map(written, lines))


def beginning(text: str, tokenizer: Path, tokens: int) -> str:
    """Return so many tokens of a text."""
    from transformers import AutoTokenizer

    encoded = AutoTokenizer.from_pretrained(tokenizer)(text, add_special_tokens=False, return_offsets_mapping=True)
    offsets = encoded["offset_mapping"]
    return text[: offsets[tokens][0]] if tokens < len(offsets) else text


@click.command(help=__doc__)
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--form", type=click.Choice(["plain", "wikitext"]), default="plain", show_default=True)
@click.option("--tokenizer", type=click.Path(path_type=Path, exists=True), help="Of --tokens.")
@click.option("--tokens", type=int, help="Take so many from the beginning.")
def main(out, form, tokenizer, tokens):
    package = importlib.util.find_spec("gensim")
    dump = Path(((package and package.submodule_search_locations) or [""])[0]) / DUMP
    if not dump.is_file():
        raise click.ClickException(f"gensim with {DUMP} is not installed: pip install --no-deps gensim==4.4.0")
    if (tokens is None) != (tokenizer is None):
        raise click.ClickException("--tokens are those of a tokenizer: give --tokens and --tokenizer, or neither")
    articles = [article for article in starmap(lines_of, pages(dump)) if len(plain(article)) > 500]
    text = "\n\n".join(map(plain, articles)) if form == "plain" else in_wikitext_form(articles)
    out.write_text(text if tokens is None else beginning(text, tokenizer, tokens), encoding="utf-8")
    click.echo(f"{len(articles)} articles, {out.stat().st_size:,} bytes in {out}")


if __name__ == "__main__":
    main()
