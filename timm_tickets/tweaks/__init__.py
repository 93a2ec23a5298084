"""Changes of a ticket's training that leave nothing behind: one file a tweak, picked by name (`registry`)."""
