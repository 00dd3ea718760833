"""The processes of a launch: started, checked, watched, and what each of them writes down of its end."""
