"""The page of a sweep: what stands in it, and what a browser makes of it where one is installed."""

import json
import re
import shutil
import subprocess
from html import escape, unescape

import pytest

from mea_compress.report.page import sweep_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HEADINGS = [
    "Loss against cache",
    "Every point",
    "What each layer costs",
    "Where the budget goes",
    "Singular spectra",
    "How alike heads are",
    "Retrieval",
]


def found_numbers(exact):
    return [
        {"task": task, "length": length, "depth": depth, "prompts": 4, "exact_match": exact}
        for task in ("passkey", "lookup")
        for length in (1024, 4096)
        for depth in (0.0, 0.5, 1.0)
    ]


def point(name, share, kl, **changes):
    figures = {
        "name": name,
        "method": name.rpartition("-")[0],
        "key_composition": "frequency",
        "value_composition": "latent",
        "share": share,
        "budget": "measured",
        "commands": ["mea-compress compress SRC OUT", "mea-compress evaluate OUT"],
        "reason": None,
        "kv_bytes_per_token": 2560 * share,
        "parameters": 1000,
        "cross_entropy": 1 + (kl or 0),
        "perplexity": 3 + (kl or 0),
        "kl": kl,
        "top1_agreement": 0.9,
        "predicted_kl": 0.9 * (kl or 0),
        "decode_tokens_per_second": 80.0,
        "seconds": 3.2,
        "widths": [[1, 2.5], [2, 1.5]],
        "retrieval": found_numbers(0.5),
        "pareto": False,
    }
    return figures | changes


def side(after):
    matrix = [[1.0, 0.3], [0.3, 1.0]]
    return {
        "channels": 64,
        "ranks": [1, 32, 64],
        "spectrum": [1.0, 0.1, 0.0],
        "order": [1, 0],
        "before": matrix,
        "after": matrix if after else None,
    }


def sweep():
    nothing = dict.fromkeys(
        ("kv_bytes_per_token", "cross_entropy", "perplexity", "top1_agreement", "predicted_kl", "seconds")
    )
    points = [
        point("frequency+latent-measured-0.5", 0.5, 0.02, pareto=True),
        point("frequency+latent-measured-0.25", 0.25, 0.3, pareto=True),
        point("prune</script><b>-0.5", 0.5, 0.4, predicted_kl=None),
        point("pool-0.75", 0.75, None, **nothing | {"reason": "no such width", "widths": None, "retrieval": None}),
    ]
    costs = [
        {"layer": layer, "side": one, "components": kept, "kl": 0.001 * (layer + 1) / kept, "cross_entropy": -0.001}
        for layer in range(2)
        for one in ("key", "value")
        for kept in (1, 2, 3)
    ]
    return {
        "source": "a <model> & its name",
        "command": "mea-compress sweep SRC --text a.txt",
        "text": ["held-out.txt"],
        "tokens": 2048,
        "reference": {
            "cross_entropy": 1.0,
            "perplexity": 3.0,
            "kv_bytes_per_token": 2560.0,
            "retrieval": found_numbers(1.0),
        },
        "points": points,
        "profiles": [
            {
                "key_composition": "frequency",
                "value_composition": "latent",
                "layers": 2,
                "heads": 4,
                "head_dim": 16,
                "points": [{**cost, "kl": 0.0} if index == 0 else cost for index, cost in enumerate(costs)],
            }
        ],
        "heads": [{"layer": layer, "key": side(after=False), "value": side(after=True)} for layer in range(2)],
        "versions": {"mea-compress": "0"},
    }


def test_the_data_stands_in_the_page_and_ends_no_script():
    page = sweep_page(sweep())
    (data,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert json.loads(data) == sweep()
    assert page.count("</script>") == 2 and "<b>" not in page
    assert "<title>a &lt;model&gt; &amp; its name: loss against cache</title>" in page
    assert not re.search(r"%[A-Z]+%", page)


def test_the_page_asks_no_network():
    page = sweep_page(sweep())
    policy = unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1])
    allowed = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert allowed["default-src"] == "'none'"
    assert all("http" not in value and "*" not in value for value in allowed.values())
    assert set(re.findall(r"https?://[^\s\"'`]*", page)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert not re.search(r"@import|url\(|<link(?! rel=\"icon\" href=\"data:,\")|fetch\(|XMLHttpRequest|import\(", page)


PROBE = """
addEventListener("load", () => setTimeout(() => {
  const seen = {};
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, view = frame.contentWindow;
    const all = [...page.querySelectorAll("main *")];
    const outside = all.filter((node) => {
      const box = node.getBoundingClientRect();
      return box.width && (box.right > view.innerWidth + 1 || box.left < -1);
    });
    const cut = all.filter((node) => {
      const clipped = view.getComputedStyle(node).overflowX !== "visible";
      return clipped && node.clientWidth && node.scrollWidth > node.clientWidth + 1;
    });
    const names = () => [...page.querySelectorAll("tbody")].map((body) => body.querySelector("td").textContent);
    const heading = [...page.querySelectorAll("thead button")].find((one) => one.textContent === "KL");
    const order = () => { heading.click(); return names(); };
    const mark = page.querySelector(".mark");
    mark.dispatchEvent(new view.PointerEvent("pointermove", { bubbles: true, clientX: 100, clientY: 100 }));
    const tip = page.getElementById("tip");
    const before = view.getComputedStyle(page.body).backgroundColor;
    page.getElementById("theme").click();
    seen[frame.width] = {
      headings: [...page.querySelectorAll("h2")].map((node) => node.textContent),
      marks: page.querySelectorAll(".mark").length,
      cells: page.querySelectorAll(".cell").length,
      wrong: page.body.innerHTML.includes("NaN") || page.body.innerHTML.includes("undefined,"),
      outside: outside.map((node) => node.outerHTML.slice(0, 80)),
      cut: cut.map((node) => node.outerHTML.slice(0, 80)),
      tip: tip.hidden ? null : tip.textContent,
      upwards: order(), downwards: order(),
      themes: [before, view.getComputedStyle(page.body).backgroundColor],
      commands: page.querySelector("tr.commands pre").textContent,
    };
  }
  document.body.innerHTML = "<pre id='seen'></pre>";
  document.getElementById("seen").textContent = JSON.stringify(seen);
}, 200));
"""


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")
def test_a_browser_shows_it_at_both_widths(tmp_path):
    page = escape(sweep_page(sweep()))
    frames = "".join(f'<iframe width="{width}" height="900" srcdoc="{page}"></iframe>' for width in (1280, 390))
    file = tmp_path / "frames.html"
    file.write_text(f"<!doctype html><meta charset='utf-8'><body>{frames}<script>{PROBE}</script>", encoding="utf-8")
    flags = ["--headless", "--disable-gpu", "--no-sandbox", "--enable-logging=stderr", "--virtual-time-budget=4000"]
    done = subprocess.run(
        [BROWSER, *flags, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in done.stderr, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    shown = re.search(r"<pre id=\"seen\">(.*?)</pre>", done.stdout, re.DOTALL)
    assert shown, done.stderr[-2000:]
    for width, seen in json.loads(unescape(shown[1])).items():
        assert seen["headings"] == HEADINGS, width
        assert seen["marks"] == 3 and seen["cells"] == 4 + 4 + 3 * 4 + 4 * 6
        assert not seen["wrong"] and seen["outside"] == seen["cut"] == [], width
        assert seen["tip"].startswith("frequency+latent-measured-0.25") and "KL 0.3, predicted 0.27" in seen["tip"]
        names = [one["name"] for one in sweep()["points"]]
        stars = [f"{names[0]} ★", f"{names[1]} ★", names[2]]
        assert seen["upwards"] == [*stars, names[3], "original"]
        assert seen["downwards"] == [*stars[::-1], names[3], "original"]
        assert len(set(seen["themes"])) == 2
        assert seen["commands"] == "mea-compress compress SRC OUT\nmea-compress evaluate OUT"
