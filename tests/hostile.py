"""What the tests of trust share: how much they fuzz, and names that are out to do harm."""

import os

from hypothesis import HealthCheck

# Fuzzing is the same in every run; longer runs are made by hand (FT_JAX_FUZZ=1000).
FUZZ = dict(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
EXAMPLES = int(os.environ.get('FT_JAX_FUZZ', 0))
HOSTILE = ['../../x', 'a/b', '/etc/passwd', 'CON', '..', '<script>alert(1)</script>', '"><img src=x onerror=alert(1)>',
           "' onload='x",
           '</svg></td>', '--><b>', '$\\frac{1}{$', '=1+1', '-2+3', '@SUM(A1)', "'=quoted", '\tTab', 'a\rb',
           'line\nbreak',
           '\x1b[2J\x1b]0;x\x07', '\u202egpj.exe', '\u05d0\u05d1', 'caf\udce9.jpg', '\x00', '{{ 7*7 }}', '%s %n', ' ',
           '"quoted", and more']
