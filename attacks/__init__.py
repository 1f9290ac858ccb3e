"""Query attacks, one algorithm a file; `robustbox.attacks` entry points name them."""
