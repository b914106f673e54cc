"""The figures, one function each, in a module for each subject: tidy rows in, a matplotlib figure out.

Importing any of them sets the theme.
"""

from qreg_utils.figures.style import set_theme

set_theme()
