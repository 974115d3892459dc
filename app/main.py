"""Run the app: `streamlit run main.py -- RUN [RUN ...]`, or `tirlab app RUN`. It reads run folders and nothing else, and writes bookmarks."""
import streamlit as st

from tirlab.app.common import choose_run, stop
from tirlab.traces.run import RunError

ICON = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" rx="7" fill="#2F6FB0"/>
<path d="M5 23 L12 13 L18 18 L27 8" fill="none" stroke="#fff" stroke-width="3.2" stroke-linecap="round" stroke-linejoin="round"/>
<circle cx="27" cy="8" r="2.6" fill="#F0A04B"/></svg>"""   # Streamlit would fetch a named icon from the network
st.set_page_config(page_title="tirlab", page_icon=ICON, layout="wide")
pages = [
    st.Page("overview.py", title="Overview", icon=":material/monitoring:", url_path="overview", default=True),
    st.Page("steps.py", title="Steps", icon=":material/stacks:", url_path="steps"),
    st.Page("trajectories.py", title="Search", icon=":material/search:", url_path="trajectories"),
    st.Page("trajectory.py", title="Trajectory", icon=":material/forum:", url_path="trajectory"),
    st.Page("control.py", title="Control tokens", icon=":material/tune:", url_path="control"),
    st.Page("compare.py", title="Compare", icon=":material/compare_arrows:", url_path="compare"),
    st.Page("dropped.py", title="Dropped", icon=":material/filter_alt_off:", url_path="dropped"),
]
st.html("<style>.stMainBlockContainer{padding:4.2rem 2.2rem 3rem}.stMainBlockContainer [data-testid=stMetric]{padding:.4rem .8rem}"
        "[data-testid=stMetricValue]{font-size:1.6rem}[data-stale=true]{opacity:1!important;transition:none!important}</style>")
page = st.navigation(pages, position="top")
choose_run()
try:
    page.run()
except RunError as e:   # a file of the run cannot be read: the other pages may still work
    stop(str(e), ":material/broken_image:")
