"""Plots in which animals speak. Two kinds of animals, `a` and `b`, with their true homes and food."""

from nanochat_jax.demo_world.stories.plot import Plot

PLOTS = (
    Plot(
        "the proud one",
        ("two animals", "place"),
        """{A a} and {a b} met {at}. "I {can_a}," said the {a}. "[Nobody is as clever as I am|What can you do]?" The
        {b} [was quiet for a moment|thought about it]. "I {can_b}," it said. The {a} [laughed|only shook its head].
        "[That is nothing|Who needs that]?" But the next day [a storm came|there was a great storm], and the {a} was
        caught under a [branch|fallen tree]. "Help!" it [cried|called]. The {b} [came at once|heard it and came]. It
        [pushed and pulled|worked all night], until the {a} was free. "[I was foolish|I am sorry that I laughed],"
        said the {a}. "[You can do more than I thought|Now I know what a friend is]." Since then the two have shared
        everything, even the {food_b}. [Everyone is good at something.|Do not laugh at others, for one day you may
        need them.]""",
    ),
    Plot(
        "winter store",
        ("two animals", "place"),
        """All summer long the {a} gathered {food_a} for the winter. The {b} lay in the sun {at} and [sang|slept].
        "[Why do you work so hard?|Will you not come and play?]" asked the {b}. "[Winter is coming|Snow will come],"
        said the {a}. "[There is still time|Winter is far away]," said the {b} and closed its eyes. Then the snow
        came. The {b} had no {food_b} and was [very hungry|cold and hungry]. It knocked at the home of the {a}. "[I
        was lazy|You were right]," it said [quietly|and looked at the ground]. "[Will you help me|May I come in]?"
        The {a} thought for a while, then it opened the door. "[Come in|There is enough for two]," it said, "but next
        summer we will work together." And so they did. [A good friend helps, and a wise friend learns.|Whoever works
        in summer does not fear the winter.]""",
    ),
    Plot(
        "who is the greatest",
        ("two animals", "judge"),
        """The {a} and the {b} had an argument. "[I am the greatest|No one is greater than I]," said the {a},
        "because I {can_a}." "No, I am," said the {b}, "because I {can_b}." They argued all [morning|day], until the
        {judge} came by. "[Ask the {judge}|You decide]," they said. The {judge} [smiled|was old and wise]. "[Bring me
        an apple from that tree|There is an apple on that tree]," it said. "Whoever brings it to me is the greatest."
        The {a} tried, but [could not do it|it failed]. The {b} tried and failed too. Then they tried together. [One
        held the branch, and the other took the apple.|One stood on the back of the other, and so they reached it.]
        "Now tell us, who is the greatest?" they asked. "[Both of you together|Neither of you alone]," said the
        {judge} and ate the apple.""",
    ),
    Plot(
        "the borrowed thing",
        ("two animals", "fragile"),
        """The {a} had {a thing}, and it was very proud of it. "[May I borrow it|Will you lend it to me]?" asked the
        {b}. "[Only for one day|But bring it back tomorrow]," said the {a}. The {b} took the {thing} home. [There it
        fell down and broke.|On the way it fell into the water and was gone.] The {b} was [afraid|ashamed]. "[I could
        say that it was stolen|I could run away]," it thought. All night it could not sleep. In the morning it went
        to the {a} and told the truth. "[I am very sorry|It was my fault]," it said. "I will [work for you|bring you
        {food_a}] until it is paid." The {a} was [sad|angry] at first. Then it said, "[A {thing} can be made again,
        but an honest friend is hard to find|I can forgive a broken {thing}, because you did not lie]." [They made a
        new one together, and it was even better than the old one.|They shook hands, and all was good again.]""",
    ),
    Plot(
        "the invitation",
        ("two animals",),
        """The {a} invited the {b} to dinner. On the table stood a [big|full] bowl of {food_a}[|, and nothing else].
        The {b} [looked at it and was sad|was polite and took one bite]. "[I do not eat {food_a}|I am sorry, but I
        eat {food_b}]," it said. "[Then come to me tomorrow|Tomorrow you will be my guest]." The next day the {a}
        went to the {b}. Now there was a bowl of {food_b}, [and nothing else|bigger than the first one]. This time
        the {a} [had to stay hungry|could not eat]. They looked at each other and began to laugh. "[We both thought
        only of ourselves|How silly we are]," said the {a}. From then on there were always two bowls on the table,
        one with {food_a} and one with {food_b}. [Ask your guest what he likes.|A good host thinks of the guest.]""",
    ),
    Plot(
        "the sleepless one",
        ("two animals", "place"),
        """The {a} could not sleep. It [turned to the left and to the right|lay down, got up and lay down again].
        "[Perhaps I am in the wrong place|I need another bed]," it thought. So it tried to sleep in {home_b}, where
        the {b} lives. But there it was [too narrow|too strange]. Then it tried to sleep {at}, but there it was too
        [loud|cold]. The {b} saw it and asked, "[Why are you still awake|What is the matter]?" "[I do not know|I
        cannot sleep]," said the {a}. "Did you say good night to anyone?" asked the {b}. The {a} [thought about
        it|shook its head]. "Good night, then," said the {b} [kindly|softly]. "Good night," said the {a} and
        [yawned|smiled]. It went back to its own [bed|home] and fell asleep at once. [Sometimes all you need is a
        kind word.|A good word is the best pillow.]""",
    ),
)
