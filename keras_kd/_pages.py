"""How does a report look in a browser? One page of HTML that needs nothing else, light or dark as the reader likes."""

import html

_STYLE = """
:root { color-scheme: light dark; --page: #fdfdfc; --text: #22272e; --soft: #5b6470; --line: #d9dde2; --shade: #f2f4f6;
  --accent: #2b5ea7; }
@media (prefers-color-scheme: dark) {
  :root { --page: #16191d; --text: #e4e7eb; --soft: #a3acb8; --line: #3a414b; --shade: #20252b; --accent: #8ab4f0; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem clamp(1rem, 4vw, 3rem) 4rem; max-width: 90rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0.5rem 0; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 0.6rem; }
h3 { font-size: 1rem; margin: 0.5rem 0; }
p, ul { max-width: 50rem; }
pre { overflow-x: auto; font-size: 0.8rem; }
img { max-width: 100%; height: auto; background: white; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
"""


def document(title: str, body: str, *, style: str = "", script: str = "") -> str:
    """A page of HTML.

    Args:
        title: text; it becomes the heading, too.
        body: HTML after the heading.
        style: CSS besides that of all reports.
        script: JavaScript that runs when the page is there.
    """
    shown = html.escape(title)
    scripts = f"<script>{script}</script>\n" if script else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{shown}</title>\n<link rel="icon" href="data:,">\n<style>{_STYLE}{style}</style>\n</head>\n'
        f"<body>\n<main>\n<h1>{shown}</h1>\n{body}\n</main>\n{scripts}</body>\n</html>\n"
    )
