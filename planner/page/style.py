"""The page's style sheet, for light and dark, and its one script. No address of anything outside."""

from __future__ import annotations

STYLE = """
:root{--ink:#1b1f24;--faint:#5b6470;--paper:#fff;--panel:#f5f6f8;--rule:#d5d9de;--idle:#eceef1;--alarm:#b3261e}
@media (prefers-color-scheme:dark){:root{--ink:#e8eaed;--faint:#a3abb5;--paper:#14171b;--panel:#1d2126;
--rule:#3a4048;--idle:#272c32;--alarm:#ff8a80}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1300px;padding:16px 28px 40px;font:15px/1.5 system-ui,sans-serif;
color:var(--ink);background:var(--paper)}
h1{font-size:22px;margin:0}h2{font-size:17px;margin:0 0 10px}h3{font-size:14px;margin:12px 0 2px}
p{margin:4px 0;max-width:105ch}header p{color:var(--faint)}
section{margin:26px 0;scroll-margin-top:8px}
svg{display:block;width:100%;height:auto;font-family:system-ui,sans-serif}
svg text:not([fill]){fill:var(--ink)}
svg .faint{fill:var(--faint)}.strong{font-weight:600}svg .alarm{fill:var(--alarm)}
.grid{stroke:var(--rule);stroke-width:1}.axis{stroke:var(--faint);stroke-width:1}
.period{stroke:var(--ink);stroke-width:1;stroke-dasharray:4 3}
.capacity{stroke:var(--alarm);stroke-width:2;stroke-dasharray:7 4}
.box{fill:var(--panel);stroke:var(--rule)}.idle{fill:var(--idle)}
.numbers{display:flex;flex-wrap:wrap;gap:10px;margin:12px 0}
.numbers div{background:var(--panel);border:1px solid var(--rule);border-radius:6px;padding:6px 14px}
.numbers b{display:block;font-size:19px}.numbers span{font-size:12.5px;color:var(--faint)}
nav{display:flex;flex-wrap:wrap;gap:16px;font-size:13.5px}nav a{color:inherit}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;font-size:13px;margin:0 0 8px}
.legend span[data-call]{cursor:pointer}
.legend i{display:inline-block;width:12px;height:12px;border-radius:2px;margin-right:6px;vertical-align:-1px}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(500px,1fr));gap:16px}
.charts svg{background:var(--panel);border:1px solid var(--rule);border-radius:6px;padding:8px;
max-width:720px}
.charts rect{shape-rendering:crispEdges}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:13.5px;width:100%}
th,td{text-align:left;padding:5px 12px 5px 0;border-bottom:1px solid var(--rule);white-space:nowrap}
th{color:var(--faint);font-weight:600}td{font-variant-numeric:tabular-nums}
.columns{columns:2;column-gap:36px;font-size:14px}article{break-inside:avoid;margin-bottom:8px}
.columns article:first-child h3{margin-top:0}
.warning{color:var(--alarm);font-weight:600}footer{color:var(--faint);font-size:13px}
.dim{opacity:.12}
@media (max-width:1000px){.columns{columns:1}.charts{grid-template-columns:1fr}}
"""

SCRIPT = """
(function(){var chosen=null;document.querySelectorAll('.legend span[data-call]').forEach(function(entry){
entry.addEventListener('click',function(){var name=entry.getAttribute('data-call');
chosen=chosen===name?null:name;
document.querySelectorAll('[data-call]').forEach(function(e){
e.classList.toggle('dim',chosen!==null&&e.getAttribute('data-call')!==chosen)})})})})();
"""
