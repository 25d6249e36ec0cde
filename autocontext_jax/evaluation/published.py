"""Published mean Dice scores in percent, as the paper prints them, for comparison with own results."""

ORGANS = ("artery", "portal_vein", "liver", "spleen", "stomach", "gallbladder", "pancreas")

# Table 2 of Roth et al. (2018). Each row: name, numbers of scans for training/testing (CV: cross-validation), and the
# Dice of each of the organs above or None. The authors warn that data sets and ways of scoring differ. They estimated
# the row of Zhou et al. from Jaccard indices. Numbers in brackets are the paper's references.
TABLE_2: tuple[tuple[str, str, tuple[float | None, ...]], ...] = (
    ("Roth et al. (2018), end-to-end", "340/37", (83.0, 79.4, 96.9, 97.2, 96.2, 83.6, 86.7)),
    ("Roth et al. (2018), unseen hospital", "none/129", (None, None, 95.3, 93.6, None, 80.8, 75.7)),
    ("Gibson et al. [7]", "72 (8-CV)", (None, None, 92.0, None, 83.0, None, 66.0)),
    ("Zhou et al. [9]", "228/12", (73.8, 22.4, 93.7, 86.8, 62.4, 59.6, 56.1)),
    ("Hu et al. [6]", "140 (CV)", (None, None, 96.0, 94.2, None, None, None)),
    ("Visceral, leader board", "20/10", (None, None, 95.0, 91.1, None, 70.6, 58.5)),
    ("Roth et al. (2018) on Visceral", "none/20", (None, None, 94.0, 87.2, None, 68.2, 61.9)),
)
