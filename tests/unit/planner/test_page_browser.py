"""The page in a real browser at the size of a laptop's screen; skipped where there is none.

Looks for what a reader would stumble over: a page wider than the screen, text that leaves its
drawing, is cut off or lies on other text, poor contrast in light and dark, a script that fails.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from planner.explain import explain
from planner.page.document import plan_page
from tests.unit.planner.test_page import large, small

BROWSER = next(
    filter(
        None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))
    ),
    None,
)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium or Chrome is installed")

PROBE = """<script>
(function(){
function luminance(text){var c=text.match(/[0-9.]+/g).slice(0,3).map(function(v){v=v/255;
 return v<=0.04045?v/12.92:Math.pow((v+0.055)/1.055,2.4)});return 0.2126*c[0]+0.7152*c[1]+0.0722*c[2]}
function contrast(a,b){var x=luminance(a),y=luminance(b);return (Math.max(x,y)+.05)/(Math.min(x,y)+.05)}
var out={width:document.documentElement.scrollWidth,screen:innerWidth,escaped:[],overlaps:[],small:[]};
var body=getComputedStyle(document.body);out.paper=body.backgroundColor;
out.contrast=contrast(body.color,body.backgroundColor);
var plain=document.querySelector('svg text:not([fill])');
out.svgContrast=contrast(getComputedStyle(plain).fill,body.backgroundColor);
document.querySelectorAll('svg').forEach(function(svg){
 var frame=svg.getBoundingClientRect();
 var boxes=[].map.call(svg.querySelectorAll('text'),function(t){var r=t.getBoundingClientRect();
  return {l:r.left,t:r.top,r:r.right,b:r.bottom,s:t.textContent,h:r.height}});
 boxes.forEach(function(x,i){
  if(x.l<frame.left-1||x.r>frame.right+1||x.t<frame.top-2||x.b>frame.bottom+2)out.escaped.push(x.s);
  if(x.h<10)out.small.push(x.s);
  for(var j=0;j<i;j++){var y=boxes[j];
   if(x.l<y.r-1&&y.l<x.r-1&&x.t<y.b-4&&y.t<x.b-4)out.overlaps.push(x.s+' | '+y.s)}})});
var entry=document.querySelector('.legend span[data-call]');entry.click();
out.dimmed=document.querySelectorAll('.dim').length;entry.click();
out.left=document.querySelectorAll('.dim').length;
var pre=document.createElement('pre');pre.id='probe';pre.textContent=JSON.stringify(out);
document.body.appendChild(pre);
})()</script>"""


def probe(tmp_path: Path, page: str, *, dark: bool = False) -> dict[str, Any]:
    path = tmp_path / "page.html"
    path.write_text(page.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    assert BROWSER is not None
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1366,768",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    found = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-500:]
    content: dict[str, Any] = json.loads(unescape(found[1]))
    return content


@pytest.mark.parametrize("size", ["8 GPUs", "1,024 GPUs"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_readable_on_a_laptop(tmp_path: Path, size: str, dark: bool) -> None:
    plan = small() if size == "8 GPUs" else large()
    found = probe(tmp_path, plan_page(explain(plan, 0.0), "plan"), dark=dark)
    assert found["width"] <= found["screen"]
    assert found["escaped"] == []
    assert found["overlaps"] == []
    assert found["small"] == []
    assert found["contrast"] >= 7
    assert found["svgContrast"] >= 7
    assert ("20" in found["paper"]) is dark
    assert found["dimmed"] > 0
    assert found["left"] == 0
