"""The report's style sheet: one column on a phone, quiet, light and dark."""

PAGE_CSS = """
:root { color-scheme: light dark; --bg: #f6f7f9; --card: #fff; --ink: #1d2430;
  --soft: #5a6472; --rule: #dfe3e8; --tint: #eaf3fb; --good: #00684b; --bad: #a63d00; }
@media (prefers-color-scheme: dark) { :root { --bg: #0e1217; --card: #161b22;
  --ink: #e8ebef; --soft: #a3adba; --rule: #313a46; --tint: #16283a;
  --good: #45d3a7; --bad: #ff9a5f; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--bg); color: var(--ink); font: 16px/1.5 system-ui,
  -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1260px; margin: 0 auto; padding: 28px 16px 56px; }
header p { margin: 0; }
.eyebrow { color: var(--soft); font-size: 14px; overflow-wrap: anywhere; }
.eyebrow span { display: inline-block; max-width: 100%; }
h1 { font-size: 16px; font-weight: 600; margin: 0 0 2px; color: var(--soft); }
.lead { font-size: clamp(22px, 4.2vw, 34px); line-height: 1.22; font-weight: 650;
  letter-spacing: -.012em; max-width: 28em; margin: 16px 0 6px !important;
  text-wrap: balance; overflow-wrap: anywhere; }
.who { color: var(--soft); overflow-wrap: anywhere; }
.narrow { display: none; }
h2 { font-size: 20px; line-height: 1.3; margin: 44px 0 4px; letter-spacing: -.006em; }
h3 { font-size: 15px; margin: 0 0 10px; }
.hint { color: var(--soft); font-size: 14px; margin: 0 0 14px; max-width: 46em; }
.tiles { display: grid; grid-template-columns: repeat(2, 1fr); gap: 10px;
  margin: 22px 0 0; padding: 0; }
@media (min-width: 840px) { .tiles { grid-template-columns: repeat(4, 1fr);
  gap: 14px; } }
.tile, .card { background: var(--card); border: 1px solid var(--rule);
  border-radius: 12px; }
.tile { padding: 12px 14px 13px; }
.tile dt { color: var(--soft); font-size: 13px; }
.tile dd { margin: 0; }
.tile .big { font-size: 22px; font-weight: 650; letter-spacing: -.01em;
  line-height: 1.25; margin: 2px 0; }
.tile .small { color: var(--soft); font-size: 13px;
  font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: 14px;
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 10px 9px; vertical-align: top;
  white-space: nowrap; border-top: 1px solid var(--rule); }
thead th { border-top: 0; color: var(--soft); font-weight: 500; font-size: 13px;
  line-height: 1.3; vertical-align: bottom; }
thead small { display: block; font-size: 12px; font-weight: 400; }
th:first-child { text-align: left; position: sticky; left: 0; z-index: 1;
  background: var(--card); border-right: 1px solid var(--rule); }
tbody th { font-weight: 500; white-space: normal; width: 190px; min-width: 128px;
  max-width: 190px; overflow-wrap: anywhere; line-height: 1.35; }
tr.best td, tr.best th:first-child { background: var(--tint); }
tr.best th { font-weight: 650; }
td small { display: block; color: var(--soft); font-size: 12.5px; line-height: 1.4; }
td small.good { color: var(--good); }
td small.bad { color: var(--bad); }
.key { width: 14px; height: 14px; vertical-align: -2px; margin-right: 7px; }
.plots { display: grid; gap: 14px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 310px), 1fr)); }
.card { padding: 14px; margin: 0; min-width: 0; }
.table { padding: 0; overflow: hidden; }
.plots .plot { display: block; width: 100%; max-width: 460px; height: auto; }
dl.methods { display: grid; grid-template-columns: minmax(0, 1fr); gap: 0 22px;
  font-size: 14px; margin: 10px 0 0; }
dl.methods dt { font-weight: 600; margin-top: 10px; }
dl.methods dd { margin: 0; color: var(--soft); overflow-wrap: anywhere; }
@media (min-width: 720px) {
  dl.methods { grid-template-columns: 150px minmax(0, 46em); }
  dl.methods dt, dl.methods dd { margin-top: 8px; } }
@media (max-width: 480px) { main { padding-top: 20px; }
  th, td { padding: 9px 10px; }
  tbody th { width: 118px; min-width: 118px; max-width: 118px; }
  .tile .big { font-size: 17px; white-space: nowrap; } }
@media (max-width: 1200px) { .narrow { display: inline; } }
@media print { body { background: #fff; } .scroll { overflow: visible; } }
"""
