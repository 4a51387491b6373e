"""Events of a session of the page in a process of its own, which imports Gradio as the page does, in half the time."""

import asyncio


def events_of_a_session() -> None:
    """Ten times two events of one session, which must not make it grow."""
    from app.without_stubs import import_page

    ui = import_page()
    import gradio as gr
    from gradio.state_holder import SessionState

    with ui.Page() as page:
        gr.Button().click(lambda: None, None, [gr.JSON(), gr.JSON()])
    state, [event] = SessionState(page), page.fns.values()

    async def events() -> None:
        for number in range(10):
            await page.postprocess_data(event, [gr.skip(), gr.skip()], state)
            await page.postprocess_data(event, [{"number": number}, {}], state)

    before = set(state.blocks_config.blocks)
    asyncio.run(events())
    assert set(state.blocks_config.blocks) == before, "components"
    assert set(state.config_values) <= before, "values"
