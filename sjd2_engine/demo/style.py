"""How the page looks; no font or script comes from elsewhere."""

CSS = """
.html-container { padding: 0 !important; }
.gradio-container { max-width: 1180px !important; margin: 0 auto; background: transparent !important; }
body, gradio-app { background:
  radial-gradient(60rem 30rem at 85% -10%, #312e8155, transparent 70%),
  radial-gradient(50rem 30rem at 0% 0%, #0e749044, transparent 70%), #0b1020 !important; }
.hero { padding: 1.4rem 0 .4rem; color: #e2e8f0; }
.hero h1 { font-size: 2.1rem; font-weight: 700; letter-spacing: -.02em; margin: 0; color: #f8fafc; }
.hero h1 span { background: linear-gradient(90deg, #7dd3fc, #a5b4fc 45%, #f0abfc); -webkit-background-clip: text;
  background-clip: text; color: transparent; }
.hero p { margin: .35rem 0 0; color: #94a3b8; font-size: 1rem; max-width: 52rem; line-height: 1.5; }
.race { color: #e2e8f0; font-variant-numeric: tabular-nums; }
.race .curtain { display: grid; place-items: center; min-height: 20rem; border: 1px dashed #334155; border-radius: 18px;
  color: #94a3b8; font-size: 1.05rem; padding: 2rem; text-align: center; }
.race .clock { display: flex; align-items: baseline; gap: .8rem; margin: 0 .2rem .8rem; }
.race .clock b { font-size: 1.6rem; color: #f8fafc; min-width: 6rem; }
.race .clock span { color: #94a3b8; }
.race .lanes { display: grid; grid-template-columns: repeat(auto-fit, minmax(270px, 1fr)); gap: 1.1rem; }
.race .lane { background: linear-gradient(180deg, #141b30, #10162a); border: 1px solid #263150; border-radius: 18px;
  padding: 1rem; display: flex; flex-direction: column; gap: .75rem; }
.race .lane.leading { border-color: #6366f1; box-shadow: 0 0 0 1px #6366f155, 0 10px 40px #6366f122; }
.race .lane.done { border-color: #10b981aa; }
.race .lane.failed { border-color: #f43f5e; }
.race header { display: grid; grid-template-columns: 1fr auto; align-items: center; }
.race header h3 { margin: 0; font-size: 1.25rem; color: #f8fafc; }
.race header p { margin: 0; grid-column: 1 / -1; color: #8b9ab5; font-size: .86rem; }
.race .badge { font-size: .8rem; font-weight: 600; color: #6ee7b7; background: #064e3b88; border: 1px solid #10b98166;
  border-radius: 99px; padding: .1rem .65rem; }
.race .failed .badge { color: #fda4af; background: #4c051988; border-color: #f43f5e66; }
.race .picture { position: relative; aspect-ratio: 1; border-radius: 12px; overflow: hidden; background: #0a0f1d; }
.race .picture img, .race .picture svg { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0;
  object-fit: fill; }
.race .missing { fill: #0a0f1d; }
.race .guess { fill-opacity: .3; stroke: #7dd3fc; stroke-opacity: .75; stroke-width: .05; }
.race .progress { height: 4px; border-radius: 2px; background: #1e293b; overflow: hidden; }
.race .progress b { display: block; height: 100%; background: linear-gradient(90deg, #38bdf8, #818cf8); }
.race .done .progress b { background: #10b981; }
.race .strip { display: grid; grid-template-columns: 2.6rem 1fr; align-items: end; height: 3.4rem; }
.race .strip strong, .race .legend strong { color: #6ee7b7; font-weight: 700; font-size: 1.05rem; }
.race .strip strong { align-self: center; }
.race .strip div { display: flex; align-items: end; gap: 2px; height: 100%; border-bottom: 1px solid #263150; }
.race .strip i { flex: 1 1 0; max-width: 14px; border-radius: 3px 3px 0 0; }
.race .strip em { color: #475569; font-size: .82rem; align-self: center; }
.race dl { display: grid; grid-template-columns: repeat(3, 1fr); gap: .5rem; margin: 0; }
.race dl div { background: #0b1122; border-radius: 10px; padding: .45rem .6rem; }
.race dd { margin: 0; font-size: 1.25rem; font-weight: 650; color: #f8fafc; }
.race dt { color: #7b8aa6; font-size: .72rem; white-space: nowrap; }
.race .legend { display: flex; flex-wrap: wrap; gap: .5rem 1.6rem; margin: .9rem .2rem 0; color: #94a3b8;
  font-size: .84rem; }
.race .legend span { display: inline-flex; align-items: center; gap: .45rem; }
.race .legend i { width: 14px; height: 14px; border-radius: 4px; display: inline-block; }
.race .legend .noise { width: 42px; background:
  linear-gradient(90deg, hsl(235 85% 68%), hsl(285 85% 68%), hsl(340 85% 68%)); }
.race .legend .open { background: #0a0f1d; border: 1px solid #334155; }
#gallery, #gallery .grid-wrap { min-height: 0 !important; height: auto !important; }
#gallery .grid-container { padding-top: 1.6rem; }
"""
# The page has one look, whatever the browser prefers.
DARK = "() => { document.body.classList.add('dark'); }"
