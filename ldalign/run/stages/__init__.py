"""The stages of a run, a file each: the folder NAME that a run has is made by NAME.py."""
