"""The page of a search: a document whose script polls the state and draws it. It shows data as plain text."""

from importlib.resources import files

from vlmtune.html_page import document

STYLE = """
header { display: flex; gap: 12px; flex-wrap: wrap; align-items: baseline; margin-bottom: 14px; }
table tr.best td { font-weight: 600; color: var(--good); }
td button, form button { font: inherit; padding: 2px 10px; border-radius: 6px; border: 1px solid var(--line);
background: var(--page); color: var(--ink); cursor: pointer; }
form { display: flex; flex-wrap: wrap; gap: 10px; align-items: end; }
label { font-size: 13px; color: var(--soft); display: grid; gap: 2px; }
input, select { font: inherit; padding: 4px 8px; border: 1px solid var(--line); border-radius: 6px;
max-width: 200px; background: var(--page); color: var(--ink); }
#said { min-height: 1.5em; margin-top: 8px; }
svg path { fill: none; stroke: var(--bar); stroke-width: 1.5; } svg path.best { stroke: var(--good);
stroke-width: 2.5; } svg path.ended { stroke: var(--soft); }
svg#curves text { font-size: 12px; }
svg circle { fill: var(--bar); } svg circle.best { fill: var(--good); }
svg circle.ended { fill: var(--soft); }
svg[hidden] { display: none; } svg line { stroke: var(--line); }
.legend span { margin-right: 14px; } .legend i { display: inline-block; width: 14px; height: 0;
border-top: 3px solid var(--bar); margin-right: 5px; vertical-align: 4px; }
.legend i.best { border-color: var(--good); }
.legend i.ended { border-color: var(--soft); }
#answered label { display: inline-flex; gap: 8px; align-items: baseline; }
#answers td, #answers th { text-align: left; white-space: pre-wrap; overflow-wrap: anywhere; min-width: 90px;
max-width: 320px; vertical-align: top; } #answers td.changed { font-weight: 600;
box-shadow: inset 3px 0 var(--bar); }
td:nth-child(2), th:nth-child(2) { text-align: left; }
@media (max-width: 500px) { label, input, select { width: 100%; max-width: none; } form { display: grid; } }
"""
BODY = """
<header><h1>Search</h1><span id="line" class="soft" aria-live="polite">…</span></header>
<p class="soft small wrap" id="folder"></p>
<section><h2 id="metric">Curves</h2><p id="none" class="soft">No trial has reported yet.</p>
<svg id="curves" viewBox="0 0 800 260" role="img" aria-label="curves of the trials" hidden></svg>
<p class="soft small legend"><span><i class="best"></i>best</span><span><i></i>running</span><span><i
class="ended"></i>ended</span></p></section>
<section><h2>Trials</h2><div class="scroll"><table id="trials"></table></div></section>
<section id="answered" hidden><h2>Answers to fixed evaluation rows</h2>
<label>of <select id="trial"></select></label>
<div class="scroll"><table id="answers"></table></div>
<p class="soft small"><span id="whose"></span> at its last checkpoints. Bold: the answer changed since the
checkpoint before.</p></section>
<section id="propose"><h2>Propose a trial</h2><form id="form"></form>
<p class="soft small">It takes the place of the next trial that is proposed; the number of trials stays.</p>
<p id="waiting" class="soft small wrap"></p><div id="said" role="status"></div></section>
"""


def page() -> str:
    """The whole document, without data."""
    script = files("vlmtune.ui").joinpath("page.js").read_text(encoding="utf-8")
    return document("vlmtune search", [BODY, f"<script>\n{script}</script>"], style=STYLE, policy=None)
