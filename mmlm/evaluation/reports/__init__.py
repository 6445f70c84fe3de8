"""What is made of finished answers: the page, the card, comparisons, dialects, contamination.

The pages themselves are drawn in `mmlm.reports`; here it is decided what stands on them.
"""
