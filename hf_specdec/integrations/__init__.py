"""hf_specdec inside other programs: a module for each, which needs its package. Nothing else imports them."""
