"""A plan as one self-contained web page. `document.plan_page` is the door."""
