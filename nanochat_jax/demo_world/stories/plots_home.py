"""Plots that happen at home and in town. The notation is that of `template`, the fields those of `tell`."""

from nanochat_jax.demo_world.stories.plot import Plot

PLOTS = (
    Plot(
        "lost pet",
        ("outside", "place"),
        """%INTRO% {His} {kind} was called {pet}. %DAY% {pet} was gone. {hero} looked [behind the house|in the
        kitchen] and in the yard, but there was no {kind} [anywhere|to be seen]. "{pet}! {pet}!" {he} called. [{hero}
        felt sad and afraid.|{He} almost began to cry.] Then {his} friend {hero2} came [along|by]. "Let us look
        together," said {hero2}. [They went to {place} and asked everyone they met|They walked to {place} and back
        again], but nobody had seen {a kind}. At last they heard a [small|soft|tiny] sound. There was {pet},
        {outside}, fast asleep! {hero} [laughed|smiled] and [hugged|stroked] {pet}. "[Next time, tell me where you
        sleep|You gave us a scare|There you are]," {he} said. [To thank {hero2}, {hero} shared some {food}.|Then they
        all went home and ate {food}.]""",
    ),
    Plot(
        "lost thing",
        ("thing", "hiding", "color"),
        """{hero} had {a shade} {thing} that {he} loved very much. %DAY% {he} could not find it. {He} looked in every
        room, [but it was not there|but found only dust]. "Where did you [see|have] it last?" asked {hero2}. {hero}
        thought [hard|for a while]. "I had it when I was feeding {pet}," {he} said. So they went to look for {pet}.
        The {kind} was [lying|sitting] in the sun and [looked very pleased|did not move]. {hero2} looked around
        [carefully|slowly] and laughed. The {shade} {thing} was {hiding}! "[{pet} wanted to play with it|{pet} has
        taken it there]," said {hero2}. {hero} was [so|very] glad. From that day on, {he} [always put the {thing}
        back in its place|kept the {thing} on a high shelf].""",
    ),
    Plot(
        "the broken thing",
        ("fragile", "adult", "color"),
        """%DAY% {hero} dropped {his} {shade} {thing}, and it broke. [It had been a present from {hero2}.|{He} had
        owned it since {he} was very small.] "[Can anyone mend it|Who can help me]?" {he} asked. {hero2} said, "Go to
        {hero3} in {town3}. {He3} is {a job3} and knows [a lot about broken things|how to mend everything]." So
        {hero} [put the {thing} in a bag|wrapped the {thing} in a cloth] and walked to {town3}. {hero3} looked at it
        [for a long time|from all sides]. "[I can do it, but it takes time|It will not be easy, but I will try],"
        {he3} said. {hero} [waited|sat down] and watched. {hero3} [worked slowly and with great care|worked until the
        sun was low]. At last the {thing} was [whole again|as good as new]. "What do I owe you?" asked {hero}. "[Only
        a smile|One song|Tell me a story, that is enough]," said {hero3}. {hero} went home [happy|singing], and the
        {shade} {thing} never broke again.""",
    ),
    Plot(
        "baking day",
        ("missing", "neighbor"),
        """It was {hero2}'s birthday, and {hero} wanted to make {food2}, because {hero2} loved it. {He} put on {a
        color} apron and [washed {his} hands|lit the stove]. But when {he} opened the cupboard, there was no
        {missing}! "[Oh no|Oh dear]," said {hero}, "[without {missing} I cannot begin!|what can I do now?]" {He}
        [ran|hurried] to the house of {hero3} and knocked. "Good morning, {hero3}. Could I have some {missing},
        please?" {hero3} [smiled|nodded] and gave {him} [enough for two days|all that {he} needed]. "[Bring me some
        of it later|I hope that it will taste good]," said {hero3}. {hero} [thanked {him3}|said thank you] and went
        back to work. Soon the whole house smelled [good|wonderful|of {food2}]. When {hero2} came, the table was
        ready. "[This is the best birthday of all|You made it for me]!" said {hero2}. They ate until they were full,
        and {hero} took [some of it|the rest] to {hero3}.""",
    ),
    Plot(
        "the noise at night",
        ("corner", "guest"),
        """%INTRO% One night {he} woke up because of a [strange|loud|funny] noise. Tap, tap, tap! [{hero} pulled the
        blanket over {his} head.|{His} heart beat fast.] "Is it {a fear}?" {he} whispered to {pet}. But {pet} [only
        yawned|did not answer]. {hero} [took a lantern|lit a candle] and went [slowly down the stairs|on {his} toes
        to the kitchen]. Tap, tap, tap! The noise came from {corner}. {hero} was afraid, but {he} looked. There sat a
        [little|small|young] {guest}! It was [cold|hungry] and had come in through the window. "You are no {fear},"
        said {hero} and laughed. {He} gave it some [warm milk|bread] and made a bed [from an old coat|of soft straw].
        In the morning {he} opened the door, and the {guest} went [home|back to its family]. {hero} was never afraid
        of noises again.""",
    ),
    Plot(
        "surprise party",
        ("place", "thing"),
        """{hero} woke up and smiled, for it was {his} birthday. But [nobody said a word about it|everyone seemed to
        have forgotten]. {hero2} said only, "[I have no time today|I must go to {place}]," and ran away. {hero} [felt
        very alone|was sad]. {He} took {pet} and walked [along the river {river}|up {hill}]. "[Even my best friend
        has forgotten me|Nobody thinks of me]," {he} told {pet}. When the sun went down, {he} came home. The house
        was dark. {hero} opened the door, and suddenly there was light everywhere! "[Surprise|Happy birthday]!"
        shouted {hero2} and all the neighbors. They had made {food}, and on the table lay {a thing} with {a color}
        ribbon. "[We had to keep it secret|I wanted to tell you all day]," said {hero2}. {hero} [laughed and cried at
        the same time|danced with joy]. It was the [best|happiest] birthday of {his} life.""",
    ),
    Plot(
        "the new neighbor",
        ("child", "place"),
        """A new family came to {town}. They had a child called {newname}. On the first day, {newname} stood all
        alone {at}. {hero} saw {newname} and thought, "[It must be hard to be new|I would be sad if I were alone]."
        So {he} [went over|walked across the grass] and said, "Hello, I am {hero}. [Do you like {hobby}?|Would you
        like to see my {kind}?]" {newname} [smiled a little|looked up]. "[Oh yes, very much|Yes]," said {newname}.
        {hero} showed {newname} the whole town: {place}, the river {river}, and {mark} in the middle of the square.
        [Then they met {hero2}, and all three played until evening.|Then {hero2} came too, and they played a game.]
        ["Yesterday I had no friends here," said {newname}, "and now I have two."|"This morning I wanted to go back
        to my old home," said {newname}, "and now I want to stay."] {hero} was [glad|happy] that {he} had said
        hello.""",
    ),
    Plot(
        "sharing",
        ("thing", "place", "color"),
        """{hero} and {hero2} were {at} when they found {a shade} {thing}. [Nobody knew whose it was.|It belonged to
        no one.] "I saw it first!" said {hero}. "But I picked it up!" said {hero2}. They [pulled at it from both
        sides|shouted at each other], and soon both were angry. [{hero} sat down under one tree and {hero2} under
        another.|They did not speak for an hour.] It was [very quiet and not much fun|boring to be alone]. At last
        {hero} said, "[I am sorry|I do not want to fight]. You can have it today, and I will have it tomorrow." "[I
        am sorry too|That is fair]," said {hero2}. "[But a {thing} is more fun with two|Let us use it together
        instead]." They [shook hands|laughed]. After that the {shade} {thing} belonged to both of them, and they
        never fought about it again.""",
    ),
    Plot(
        "the school play",
        ("role", "neighbor"),
        """The school of {town} put on a play, and {hero} was {a role}. {He} [practiced every day in front of
        {pet}|learned every line by heart]. [{pet} was a very patient {kind}.|Even {pet} seemed to know the words.]
        On the great evening all the people came, even {hero3} the {job3}. {hero} [stepped out into the light|came
        onto the stage] and opened {his} mouth, but [no word came out|all the words were gone]! The hall was very
        quiet. {hero} [looked at {his} shoes|turned red]. Then {hero2}, who stood behind the curtain, [softly
        whispered|whispered] the first line. {hero} [took a deep breath|smiled] and began to speak. After that
        everything went well. At the end the people clapped [for a long time|and cheered]. "[You were a wonderful
        {role}|I liked you best of all]," said {hero3}. "[I had good help|Without {hero2} I would still be standing
        there]," said {hero}.""",
    ),
    Plot(
        "the lost coins",
        ("neighbor", "place"),
        """%DAY% {hero} found a small bag {at}. There were [ten|twelve|twenty] silver coins in it. "[With these I
        could buy anything|So many coins]!" {he} thought. "[I could buy {food} every day|I could buy a new coat and a
        drum]." But then {he} thought of the person who had lost it. [{pet} looked at {him} with round eyes.|{He} sat
        down and thought for a while.] {hero} went from door to door and asked, "Is this yours?" [Everyone shook
        their heads.|Nobody knew the bag.] At the last door {he} met {hero3} the {job3}, who [was looking for
        something in the grass|looked very worried]. "[I have lost the coins for my new roof|I have lost everything I
        saved this year]!" said {hero3}. {hero} held out the bag. {hero3} could not believe it. "[You are an honest
        {person}|The world needs more people like you]," said {hero3} and gave {him} one coin. {hero} bought some
        {food} and shared it with {hero2}.""",
    ),
    Plot(
        "learning",
        ("skill", "open place"),
        """{hero} wanted to learn [how |]to {skill}. "[That is easy|You only have to try]," said {hero2}, who could
        do it well. So they [met|began] {at} [early in the morning|after school]. The first time, {hero} [did
        everything wrong|made a mess of it]. The second time, it was [even worse|not much better]. "[I will never
        learn it|I give up]!" {he} said and [threw {his} hat on the ground|sat down on a stone]. {hero2} sat down
        [beside {him}|next to {him}]. "When I began, I [needed a whole month|was much worse than you]," said {hero2}.
        "[Every day a little|One more time]." So {hero} tried again, every day for a week. On the seventh day,
        [suddenly|all at once,] it worked! "Look at me!" {he} shouted. {pet} [jumped|ran] around {him} with joy.
        Since that day {hero} knows: whoever tries often enough learns to {skill}.""",
    ),
    Plot(
        "the old neighbor",
        ("neighbor", "vegetable"),
        """{hero3} the {job3} had [hurt {his3} foot|caught a cold] and could not work in the garden. The {vegetable}
        were ripe, but [nobody was there to pick them|they still stood in the ground]. When {hero} [heard about
        it|saw this], {he} went to fetch {hero2}. "[Four hands are better than two|We can help]," said {hero2}. They
        took [two baskets|a basket] and worked all [morning|afternoon]. [{pet} watched from the wall.|{pet} ran
        around between the rows.] It was [hard work|hot], but they sang, and so the time passed quickly. When the
        last of the {vegetable} lay in the basket, {hero3} came to the door. "[How can I ever thank you|What would I
        do without you]?" {he3} [said|asked]. "[Get well soon|Tell us a story]!" said {hero}. So {hero3} made soup
        from the {vegetable}, and they sat by the fire and [talked until the moon came up|listened to stories of long
        ago].""",
    ),
)
