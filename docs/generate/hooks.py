"""What MkDocs calls while it builds the site: pages that follow from the code are made here, so that none goes stale.

A page that cannot be made, because a pruner has no entry in knowledge.py or its command is not valid, ends the build.
"""

import posixpath
import re
from pathlib import Path

import cards
import notebooks
import recipe_pages
import reference
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[2]
TOP = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
_CODE = re.compile(r"(?<!\[)`([^`\n]+)`(?!\])")
_pages: dict[str, str] = {}  # text by its place in the site
_names: dict[str, str] = {}  # the page that explains a name, which is linked wherever the name stands as code


def on_config(config):
    """Make the pages and put them in the navigation, before MkDocs looks for either."""
    _pages.clear()
    _names.clear()
    _pages.update({place: (ROOT / path).read_text("utf-8") for place, path in TOP.items()})
    _pages["index.md"] = _pages["index.md"].partition("\n## Which method\n")[0] + _onwards()
    for path in sorted(ROOT.glob("benchmarks/results/*.md")):
        _pages[f"measured/{path.name}"] = path.read_text("utf-8")
        _names[str(path.relative_to(ROOT))] = _names[path.name] = f"measured/{path.name}"
    made = {
        "<methods>": cards.method_pages(),
        "<tweaks>": cards.tweak_pages(),
        "<recipes>": recipe_pages.pages(),
        "<reference>": reference.pages(),
        "<notebooks>": notebooks.pages(),
    }
    for pages in made.values():
        _pages.update(pages)
    for name in (*cards.METHODS, *cards.TWEAKS):
        _names[name] = f"{'methods' if name in cards.METHODS else 'tweaks'}/{name}.md"
    nav = {key: list(pages) for key, pages in made.items()} | {"<methods>": cards.method_nav()}
    nav["<benchmarks>"] = [place for place in _pages if place.startswith("measured/")]
    config.nav = _filled(config.nav, nav)
    return config


def _filled(nav, made):
    """The navigation with lists of pages where it has their names."""
    if isinstance(nav, dict):
        return {title: _filled(below, made) for title, below in nav.items()}
    if isinstance(nav, list):
        whole = (_filled(item, made) for item in nav)
        return [one for item in whole for one in (item if isinstance(item, list) else [item])]
    return made.get(nav, nav)


def on_files(files, config):
    for place, text in _pages.items():
        files.append(File.generated(config, place, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Fill in tables that follow from the code, and link the names of methods, tweaks, recipes and measurements."""
    here = page.file.src_uri
    markdown = _moved(re.sub(r"<!-- not on the site -->.*?<!-- on the site -->", "", markdown, flags=re.DOTALL), here)
    for marker, made in cards.TABLES.items():
        if f"<!-- {marker} -->" in markdown:
            markdown = markdown.replace(f"<!-- {marker} -->", made())
    seen = {here}

    def linked(found):
        name = found[1]
        target = _names.get(name)
        if target is None or target in seen:
            return found[0]
        seen.add(target)
        return f"[`{name}`]({posixpath.relpath(target, posixpath.dirname(here) or '.')})"

    out, fenced = [], False
    for line in markdown.split("\n"):
        fenced ^= line.lstrip().startswith("```")
        if line.startswith("|"):
            seen = {here}  # a table is looked things up in: every row has its links
        plain = fenced or line.startswith(("#", "    ", "<"))
        out.append(line if plain else _CODE.sub(linked, line))
    return "\n".join(out)


def _moved(text, here):
    """A page with its links as the site has them: docs/ and what lies above it are one folder there."""
    text = re.sub(r"\]\(docs/", "](", text)
    for place, path in TOP.items():
        target = posixpath.relpath(place, posixpath.dirname(here) or ".")
        text = re.sub(rf"\]\((?:\.\./)*{re.escape(path)}(?=[)#])", f"]({target}", text)
    return text


def _onwards():
    return (
        "\n## Where to go on\n\n"
        "- [Choosing a method](choosing.md), by what you want and what you can spend; [all of them](methods/index.md)\n"
        "- [Questions](questions.md): why is it not faster? which file is my model? how much disk?\n"
        "- [What is promised and tested](promises.md)\n"
    )
