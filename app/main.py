"""The app: `streamlit run main.py -- RUN`, or `tirlab app RUN`. Reads a run folder and nothing else."""
import streamlit as st

st.set_page_config(page_title="tirlab", page_icon=":material/timeline:", layout="wide")
pages = [
    st.Page("overview.py", title="Overview", icon=":material/monitoring:", url_path="overview", default=True),
    st.Page("trajectories.py", title="Trajectories", icon=":material/list:", url_path="trajectories"),
    st.Page("trajectory.py", title="Trajectory", icon=":material/forum:", url_path="trajectory"),
]
st.html("<style>.stMainBlockContainer{padding-top:4.2rem;padding-bottom:3rem}</style>")
st.navigation(pages, position="top").run()
