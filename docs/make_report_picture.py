"""Makes docs/report.png: the upper part of the demo's report, as a browser shows it (needs Chromium or Chrome).

    make demo && python docs/make_report_picture.py
"""

import pathlib
import shutil
import subprocess
import sys
import tempfile

import PIL.Image

ROOT = pathlib.Path(__file__).parents[1]
WIDTH, HEIGHT = 960, 960
BROWSERS = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')


def main(page: pathlib.Path) -> None:
  """Draws the page and keeps it with 128 colours."""
  browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
  if browser is None:
    sys.exit(f'no browser was found; install one of {", ".join(BROWSERS)}')
  with tempfile.TemporaryDirectory() as folder:
    picture = pathlib.Path(folder) / 'report.png'
    subprocess.run([browser, '--headless', '--no-sandbox', '--hide-scrollbars', f'--window-size={WIDTH},{HEIGHT}',
                    f'--screenshot={picture}', page.resolve().as_uri()], check=True, capture_output=True)
    PIL.Image.open(picture).convert('RGB').quantize(128).save(ROOT / 'docs' / 'report.png', optimize=True)


if __name__ == '__main__':
  main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / 'runs' / 'digits' / 'report.html')
